"""Results of several processes as one file, with what they show together.

python benchmarks/caching/merge.py q/*.json speed/*.json --output results/caching_h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import claims_table, quality_table, speed_table

Row = Mapping[str, Any]


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the same comparison together; a later speed of a model replaces an earlier one."""
    result: dict[str, Any] = {"environment": parts[0]["environment"]}
    quality: dict[str, Any] = {}
    speeds: dict[str, Any] = {}
    for part in parts:
        for one in part.get("quality", []):
            known = quality.setdefault(one["dtype"], {**one, "rows": [], "rollouts": 0})
            if known["seeds"] != one["seeds"] or known["calls"] != one["calls"]:
                raise SystemExit("qualities of different seeds or loops cannot be merged")
            known["rows"] += one["rows"]
            known["rollouts"] += one["rollouts"]
        speeds |= {one["model"]: one for one in part.get("speed", [])}
    for one in quality.values():
        planners = dict.fromkeys(row["method"] for row in one["rows"] if _ours(row["method"]))
        one["claims"] = {name: claims(one["rows"], name) for name in planners}
    result["quality"], result["speed"] = list(quality.values()), list(speeds.values())
    result["published"] = [
        published
        for one in quality.values()
        for speed in speeds.values()
        if "loops" in speed
        for published in [at_published_speed(speed, one)]
    ]
    return result


def curve(rows: Sequence[Row], method: str) -> dict[int, Row]:
    """K -> the best row of a method with at most K full calls."""
    budgets = sorted({row["budget"] for row in rows})
    found = {}
    for budget in budgets:
        within = [r for r in rows if r["method"] == method and r["full_calls"] <= budget]
        if within:
            found[budget] = max(within, key=lambda row: row["mean_db"])
    return found


def _ours(method: str) -> bool:
    return method.startswith("planned")


def claims(rows: Sequence[Row], planner: str = "planned") -> list[dict[str, Any]]:
    """For each K: a planner's lead over the best baseline, and full calls at equal PSNR.

    At equal PSNR both ways: our fewest calls for the best baseline's, and the fewest of any
    baseline for ours (None: more than were tried).
    """
    ours = curve(rows, planner)
    rivals = {
        method: curve(rows, method)
        for method in dict.fromkeys(row["method"] for row in rows)
        if not _ours(method)
    }
    found = []
    for budget, mine in ours.items():
        within = [rival[budget] for rival in rivals.values() if budget in rival]
        if not within:
            continue
        best = max(within, key=lambda row: row["mean_db"])
        reached = [k for k, row in ours.items() if row["mean_db"] >= best["mean_db"]]
        needed = [
            row["full_calls"]
            for rival in rivals.values()
            for row in rival.values()
            if row["mean_db"] >= mine["mean_db"]
        ]
        found.append(
            {
                "budget": budget,
                "psnr_db": mine["mean_db"],
                "full_calls": mine["full_calls"],
                "best_baseline": best["method"],
                "its_psnr_db": best["mean_db"],
                "its_full_calls": best["full_calls"],
                "lead_db": round(mine["mean_db"] - best["mean_db"], 2),
                "full_calls_for_its_psnr": min(reached, default=None),
                "baselines_full_calls_for_our_psnr": min(needed, default=None),
            }
        )
    return found


def at_published_speed(speed: Row, quality: Row) -> dict[str, Any]:
    """K at which a published speedup is reached, and the trained model's PSNR at that K."""
    calls = quality["calls"]
    k = speed["published"]["full_calls"][str(calls)]
    ours = curve(quality["rows"], "planned")
    return {
        "model": speed["model"],
        "speedup": speed["published"]["speedup"],
        "calls": calls,
        "full_calls": k,
        "trained_model_psnr_db": ours[k]["mean_db"] if k in ours else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = merged([json.loads(path.read_text()) for path in arguments.files])
    for one in result["quality"]:
        print(quality_table(one))
        for name, found in one["claims"].items():
            print(f"\n{name}:\n{claims_table(found)}")
    if result["speed"]:
        print(speed_table(result["speed"]))
    print(json.dumps(result["published"]))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
