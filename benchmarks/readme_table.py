"""Write the README's tables from the JSON under benchmarks/results/: `make docs`.

Taken up are the files that `ditopt bench --json`, `ditopt demo --json`, `benchmarks/models.py` and
`benchmarks/attention.py` wrote.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
COLUMNS = ("variant", "time (IQR)", "vs `torch.compile`", "PSNR (worst seed)", "SSIM", "compile")


def header(columns: tuple[str, ...]) -> str:
    """The first two lines of a table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def row_text(row: dict[str, Any], inductor_ms: float) -> str:
    """One line of a table."""
    quality = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    if row.get("psnr_min_db") is not None:
        quality += f" ({row['psnr_min_db']:.1f})"
    time = f"{row['ms'] / 1e3:.2f} s ({row['ms_iqr'] / 1e3:.2f})"
    speedup = f"{inductor_ms / row['ms']:.2f}x"
    cells = (
        row["variant"],
        time,
        speedup,
        quality,
        f"{row['ssim']:.3f}",
        f"{row['compile_s']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def table_text(path: Path, result: dict[str, Any]) -> str:
    """One recorded bench as a titled table."""
    where = result["environment"]
    inductor_ms = next(row["ms"] for row in result["rows"] if row["variant"] == "inductor")
    title = f"**{where['workload']}**, one sampling loop on {where['name']}"
    facts = f"{where['threads']} threads, torch {where['torch']}, {where['date']}, `{path.name}`"
    rows = "\n".join(row_text(row, inductor_ms) for row in result["rows"])
    return f"{title} ({facts}):\n\n{header(COLUMNS)}\n{rows}\n"


def is_bench(result: Any) -> bool:
    """Whether a JSON value is a bench whose gate was green."""
    rows = result.get("rows", []) if isinstance(result, dict) else []
    variants = [row.get("variant") for row in rows if isinstance(row, dict)]
    return "inductor" in variants and all(row.get("ms") for row in rows)


MODEL_COLUMNS = (
    *("model, one step", "eager", "torch.compile", "ditopt, no plan"),
    *("of torch.compile", "first call"),
)


def models_text(path: Path, result: dict[str, Any]) -> str:
    """One step of published shapes, without a plan, and the cold first call."""
    where, rows = result["environment"], []
    for model in result["models"]:
        by_name = {variant["variant"]: variant for variant in model["variants"]}
        eager, inductor, ours = (by_name[name] for name in ("eager", "inductor", "ditopt"))
        times = " | ".join(f"{variant['ms']:.1f} ms" for variant in (eager, inductor, ours))
        cold = f"{ours['first_call_s']:.0f} s, torch.compile {inductor['first_call_s']:.0f} s"
        rows.append(f"| {model['title']} | {times} | {ours['ratio_to_inductor']:.3f} | {cold} |")
    facts = f"{where['name']}, torch {where['torch']}, {where['date']}, `{path.name}`"
    title = "**Published shapes, random weights, bf16, lossless work only**"
    return f"{title} ({facts}):\n\n{header(MODEL_COLUMNS)}\n" + "\n".join(rows) + "\n"


ATTENTION_COLUMNS = (
    *("shape", "density", "time", "over cuDNN dense", "ours"),
    *("FlashAttention-4", "plain Triton", "FlexAttention"),
)


def attention_text(path: Path, result: dict[str, Any]) -> str:
    """Block-sparse attention: time, speedup, and efficiency (speedup x density) of each kernel."""
    by_case: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in result["results"]:
        if "efficiency" in row and row["block"] == [128, 128] and row["density"] < 1:
            case = (row["shape"], row["lists"], round(row["density"], 3))
            by_case.setdefault(case, {})[row["implementation"]] = row
    rows = []
    for (shape, lists, density), found in by_case.items():
        ours = found["ours"]
        kernels = ("ours", "FlashAttention-4", "ours, plain Triton", "FlexAttention, compiled")
        shares = " | ".join(
            f"{found[name]['efficiency']:.2f}" if name in found else "" for name in kernels
        )
        heads = " (mixed heads)" if lists == "mixed" else ""
        speedup = f"{ours['speedup_over_cudnn']:.2f}x"
        rows.append(
            f"| {shape} | {density:g}{heads} | {ours['ms']:.2f} ms | {speedup} | {shares} |"
        )
    facts = f"{result['gpu']}, torch {result['versions']['torch']}, {result['date']}, `{path.name}`"
    title = (
        "**Block-sparse attention, 128 x 128 blocks, efficiency = speedup over cuDNN x density**"
    )
    return f"{title} ({facts}):\n\n{header(ATTENTION_COLUMNS)}\n" + "\n".join(rows) + "\n"


CACHING_COLUMNS = ("full calls K of T", "planned", "best published cache", "its PSNR")
LOOP_COLUMNS = ("one loop", "skipped call", "K/T", "speedup", "of its bound", "over torch.compile")


def caching_text(path: Path, result: dict[str, Any]) -> str:
    """Step caching: PSNR against published caches, and loops of published shapes."""
    facts = f"{result['environment']['name']}, torch {result['environment']['torch']}, "
    facts += f"{result['environment']['date']}, `{path.name}`"
    quality, rows = result["quality"][0], []
    for claim in quality["claims"]["planned"]:
        rival = f"{claim['best_baseline']} (K = {claim['its_full_calls']:g})"
        cells = (f"{claim['psnr_db']:.1f} dB", rival, f"{claim['its_psnr_db']:.1f} dB")
        rows.append(f"| {claim['budget']} of {quality['calls']} | {' | '.join(cells)} |")
    seeds = len(quality["seeds"]["audit"])
    title = f"**Step caching, tiny_video, mean PSNR over {seeds} fresh seeds**"
    text = f"{title} ({facts}):\n\n{header(CACHING_COLUMNS)}\n" + "\n".join(rows) + "\n\n"
    rows = []
    for speed in result["speed"]:
        share, calls = f"{speed['steps']['share']:.2%} of a full one", speed["calls"]
        for loop in speed["loops"]:
            if loop.get("full_calls") and "," not in loop["loop"]:
                over = f"{loop['speedup_over_torch.compile']:.2f}x"
                cells = (f"{loop['full_calls']}/{calls}", f"{loop['speedup_over_full']:.2f}x")
                bound = f"{loop['share_of_bound']:.0%}"
                rows.append(
                    f"| {speed['title']} | {share} | {' | '.join(cells)} | {bound} | {over} |"
                )
    title = "**Step caching, loops of published shapes, bf16, bound T / (K + (T - K) s)**"
    return f"{text}{title} ({facts}):\n\n{header(LOOP_COLUMNS)}\n" + "\n".join(rows) + "\n"


def section(path: Path, result: Any) -> str | None:
    """The table of one recorded file, None for files that have none."""
    if is_bench(result):
        return table_text(path, result)
    if isinstance(result, dict) and path.stem.startswith("models"):
        return models_text(path, result)
    if re.fullmatch(r"attention_[a-z]+\d+", path.stem):
        return attention_text(path, result)
    if isinstance(result, dict) and path.stem.startswith("caching"):
        return caching_text(path, result)
    return None


def readme_text() -> str:
    """The README with its tables as the results say."""
    results = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    tables = [text for path, result in results.items() if (text := section(path, result))]
    text = "\n".join(tables) or "Nothing is recorded yet.\n"
    return PLACE.sub(lambda place: place[1] + text + place[2], README.read_text())


if __name__ == "__main__":
    README.write_text(readme_text())
