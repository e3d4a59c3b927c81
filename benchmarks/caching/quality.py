"""Quality of cache schedules on the trained model, against published caches.

    python benchmarks/caching/quality.py --only planned --output planned.json
    python benchmarks/caching/quality.py --only recipes --output recipes.json
    python benchmarks/caching/merge.py planned.json recipes.json --output quality.json

Profile seeds are recorded. Every contender is sampled on tune seeds, for each number K of full
calls with all settings that it may try, and its best is judged on audit seeds, which nothing has
seen before: mean PSNR against the dense result of eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from batch import CLIP, sample_together
from contenders import Entry, Sampled, planned_entries, recipe_entries, released
from published import Stack, in_place_of_blocks
from recording import Recording, record

from ditopt.environment import describe_environment
from ditopt.recipes import recipe_names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

PROFILE_SEEDS, TUNE_SEEDS, AUDIT_SEEDS = range(8), range(1000, 1008), range(2000, 2008)
SMALL = (3, 1, 16, 16)
PARTS = ("planned", "recipes", "released")


def judged(entry: Entry, sampled: Sampled, audit: Sequence[int]) -> dict[str, Any]:
    """One entry on the audit seeds."""
    values = sampled.psnrs(entry.schedule, audit)
    rows = entry.schedule.rows.values()
    return {
        "method": entry.method,
        "budget": entry.budget,
        "full_calls": len(entry.schedule.full),
        "full": entry.schedule.full,
        "settings": entry.settings,
        "schedules_sampled": entry.tries,
        "psnr_db": [round(value, 2) for value in values],
        "mean_db": round(statistics.fmean(values), 2),
        "min_db": round(min(values), 2),
        "gain": round(max((sum(map(abs, row)) for row in rows), default=0.0), 2),
    }


def released_rows(
    recording: Recording,
    sampled: Sampled,
    budgets: Sequence[int],
    tune: Sequence[int],
    audit: Sequence[int],
    only: str,
) -> Iterator[dict[str, Any]]:
    """Caches that run outside of plans, each with its best settings on tune seeds."""
    workload = sampled.workload
    for seed in (*tune, *audit):
        sampled.dense(seed)  # now: below, another stack stands in the model's place

    def one(make: Any, counted: float | None, seeds: Sequence[int]) -> tuple[float, list[float]]:
        counts, values = [], []
        if counted is not None and seeds is tune:  # no decisions: all seeds as one batch
            with in_place_of_blocks(workload.model, make):
                results = sample_together(workload.model, seeds, workload.model, sampled.shape)
            pairs = zip(results, seeds, strict=True)
            return counted, [sampled.compare(result, seed) for result, seed in pairs]
        for seed in seeds:
            with in_place_of_blocks(workload.model, make) as stack:
                result = workload.run(seed)
            assert isinstance(stack, Stack)
            counts.append(float(stack.full_calls) if counted is None else counted)
            values.append(sampled.compare(result, seed))
        return statistics.fmean(counts), values

    tried: dict[str, list[tuple[float, float, Any, Any, float | None]]] = {}
    for method, settings, make, counted in released(recording, workload, 0):
        if only not in method or (counted is not None and counted > max(budgets)):
            continue
        count, values = one(make, counted, tune)
        tried.setdefault(method, []).append(
            (count, statistics.fmean(values), settings, make, counted)
        )
    for method, all_of_it in tried.items():
        for budget in budgets:
            within = [item for item in all_of_it if item[0] <= budget]
            if not within:
                continue
            _, _, settings, make, counted = max(within, key=lambda item: item[1])
            count, values = one(make, counted, audit)
            yield {
                "method": method,
                "budget": budget,
                "full_calls": round(count, 2),
                "settings": settings,
                "schedules_sampled": len(all_of_it),
                "psnr_db": [round(value, 2) for value in values],
                "mean_db": round(statistics.fmean(values), 2),
                "min_db": round(min(values), 2),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", help=f"{PARTS}, or a recipe, or a released cache")
    parser.add_argument("--backend", default="eager", choices=["inductor", "eager"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budgets", nargs="*", type=int, default=list(range(4, 13)))
    parser.add_argument("--short-list", type=int, default=24)
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--history", type=int, default=3, help="residuals in a planned row")
    parser.add_argument("--seeds", type=int, default=8, help="to record, and as many to tune on")
    parser.add_argument("--tiny", action="store_true", help="small clips, few seeds: a dry run")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch._dynamo.config.automatic_dynamic_shapes = False  # one graph for each batch size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    from tiny_video.workload import workload as make

    workload = make(device=device.type, dtype=getattr(torch, arguments.dtype))
    if arguments.tiny:
        workload = small(workload)
    sizes = (1, 2, 1) if arguments.tiny else (arguments.seeds, arguments.seeds, 8)
    seeds = (PROFILE_SEEDS, TUNE_SEEDS, AUDIT_SEEDS)
    profile, tune, audit = ([*all_of[:n]] for all_of, n in zip(seeds, sizes, strict=True))
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        recording = record(workload, profile)
        shape = SMALL if arguments.tiny else CLIP
        sampled = Sampled(workload, recording, arguments.backend, shape)
        plain = [sampled.compare(sampled.run(None, seed), seed) for seed in audit]
        planner = {name: getattr(arguments, name) for name in ("short_list", "moves", "history")}
        result = {
            "model": "examples/tiny_video",
            "dtype": arguments.dtype,
            "backend": arguments.backend,
            "calls": recording.calls,
            "seeds": {"profile": profile, "tune": tune, "audit": audit},
            "planner": planner,
            "full_plan_db": [round(value, 2) for value in plain],
            "rows": rows,
        }
        everything = {"environment": describe_environment(device), "quality": [result]}

        def add(row: dict[str, Any]) -> None:
            rows.append(row)
            result["seconds"] = round(time.perf_counter() - started, 1)
            result["rollouts"] = sampled.rollouts
            arguments.output.write_text(json.dumps(everything, indent=1) + "\n")

        print(f"ready: {time.perf_counter() - started:.0f} s, full plan {plain}", flush=True)
        common = (recording, sampled, arguments.budgets, tune)
        if arguments.only in ("", "planned"):
            for entry in planned_entries(*common, *planner.values()):
                add(judged(entry, sampled, audit))
        for name in recipe_names():
            if arguments.only in ("", "recipes", name):
                for entry in recipe_entries(name, *common):
                    add(judged(entry, sampled, audit))
        if arguments.only in ("", "released") or "as released" in arguments.only:
            only = "" if arguments.only == "released" else arguments.only
            for row in released_rows(*common, audit, only):
                add(row)
    for row in rows:
        print(row["method"], row["budget"], row["full_calls"], row["mean_db"], row["min_db"])
    print(f"{sampled.rollouts} rollouts, {time.perf_counter() - started:.0f} s", flush=True)


def small(workload: Any) -> Any:
    """The trained model on 16 tokens."""

    def sample(model: Any, seed: int) -> torch.Tensor:
        return sample_together(workload.model, [seed], model, SMALL)[0]

    return replace(workload, sample=sample)


if __name__ == "__main__":
    main()
