"""Results of caching as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def speed_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Loops of published shapes."""
    lines = ["| model | loop | ms | IQR | x full | bound | of bound | x torch.compile |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for result in results:
        if "loops" not in result:
            lines.append(f"| {result['model']} | withheld: gate {result.get('gate')} |")
            continue
        for row in result["loops"]:
            limit = f"{row['bound']:.3f} | {row['share_of_bound']:.1%}" if "bound" in row else " | "
            lines.append(
                f"| {result['model']} | {row['loop']} | {row['ms']:.1f} | {row['iqr_ms']:.1f} "
                f"| {row['speedup_over_full']:.3f} | {limit} "
                f"| {row.get('speedup_over_torch.compile', math.nan):.3f} |"
            )
        for kind in ("steps", "steps_operators"):
            if kind in result:
                steps = result[kind]
                lines.append(
                    f"{result['model']}, {kind}: full {steps['full_in_a_row_ms']:.2f} ms, skip "
                    f"{steps['skip_in_a_row_ms']:.3f} ms = {steps['share']:.2%} (waited for: "
                    f"{steps['full_ms']:.2f}, {steps['skip_waited_ms']:.3f})"
                )
        lines.append(f"  {result['published']}")
        if "skip_kernels" in result:
            kernels = result["skip_kernels"]
            lines.append(f"  skip: {kernels['count']} kernels, {kernels['ms']:.3f} ms")
            lines += [f"    {ms} {kernel}" for kernel, ms in kernels["longest"][:6]]
        lines += [f"  memory: {json.dumps(one)}" for one in result.get("memory", ())]
    return "\n".join(lines)


def quality_table(result: Mapping[str, Any]) -> str:
    """Mean PSNR on audit seeds by method and number of full calls."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows})
    lines = [
        f"{result['model']}, {result['dtype']}: mean PSNR over {len(result['seeds']['audit'])} "
        f"seeds; {result['rollouts']} samples taken by schedules",
        f"| method | {' | '.join(f'K={k}' for k in budgets)} |",
        "|---|" + "---|" * len(budgets),
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for k in budgets:
            row = next((r for r in rows if (r["method"], r["budget"]) == (name, k)), None)
            if row is None:
                cells.append("-")
                continue
            less = "" if row["full_calls"] == k else f" ({row['full_calls']:g})"
            cells.append(f"{row['mean_db']:.2f}{less}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """The planner against the best baseline with as many full calls."""
    lines = [
        "| K | planned | best baseline | its PSNR | lead | our full calls for its PSNR "
        "| baselines' full calls for ours |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['budget']} | {c['psnr_db']:.2f} dB | {c['best_baseline']} ({c['its_full_calls']:g}) "
        f"| {c['its_psnr_db']:.2f} dB | {c['lead_db']:+.2f} dB | {c['full_calls_for_its_psnr']} "
        f"| {c['baselines_full_calls_for_our_psnr'] or 'more than tried'} |"
        for c in claims
    ]
    return "\n".join(lines)
