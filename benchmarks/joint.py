"""The joint plan against single techniques and published recipes, at one quality, on a CPU.

    python benchmarks/joint.py PROFILE --work DIR --stage search     # plans by ditopt
    python benchmarks/joint.py PROFILE --work DIR --stage quality    # baselines
    python benchmarks/joint.py PROFILE --work DIR --stage audit      # all of them, the same seeds
    python benchmarks/joint.py PROFILE --work DIR --stage time       # alone on the machine
    ... --output benchmarks/results/joint_cpu.json                   # with any stage
    ... --stage search --only joint                                  # a share of a stage
    ... --stage merge --parts DIR DIR                                # shares together

The embedded video model, or --workload. `search` plans with all techniques, and with each one
alone. `quality` gives every recipe of step caching and of attention its best settings: of those
that reach the goal on tune seeds, the one with fewest full calls (caches, with the setting that the
profile predicts to be best for each number) or of lowest quality (attention). `audit` judges all on
the same seeds. These stages sample without compilation and keep each sample in DIR, so they go on
after an interruption. `time` compiles all plans and runs them in turns. Several processes may share
a stage, each with the names after --only and a folder of its own; `merge` brings their records and
plans together in that of --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))
sys.path.append(str(Path(__file__).parent / "caching"))

import numpy as np
import torch
from prediction import PlanSampler, example
from recording import record

from ditopt.bench import bench
from ditopt.environment import describe_environment
from ditopt.errors import DitoptError, GoalUnattainable
from ditopt.plan import Goal, Phase, Plan
from ditopt.profiling.schema import Profile, SeedRecord, load_complete
from ditopt.recipes import Recipe, recipe_names
from ditopt.recipes.attention import AttentionRecipe
from ditopt.search import LoopSpec, Measured, SearchOptions, find_plan
from ditopt.search.closed_loop import AUDIT_SEED, TUNE_SEED
from ditopt.search.exchange import cache_section
from ditopt.search.run import predictor_of
from ditopt.search.sensitivity import TECHNIQUES, Technique
from ditopt.workload import Workload, load_workload

SEARCHED: dict[str, tuple[Technique, ...]] = {
    "cache only": ("cache",),
    "linears only": ("linears",),
    "attention only": ("attention",),
    "joint": TECHNIQUES,  # last: its record stays in the profile folder
}


STAGES = ("search", "quality", "audit", "time", "merge")


class Samples:
    """PSNR of plans by seed, kept in a file; stands for the sampler of a search."""

    def __init__(self, workload: Workload, work: Path) -> None:
        self.workload, self.work = workload, work
        self.sampler = PlanSampler(workload, work)
        self.path = work / "samples.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __call__(self, plan: Plan, seeds: Sequence[int]) -> list[Measured]:
        assert plan.predicted is not None
        return [Measured(self.psnr_db(plan, seed), plan.predicted.seconds) for seed in seeds]

    def psnr_db(self, plan: Plan, seed: int) -> float:
        choices = plan.model_dump_json(include={"layout", "block", "order", "phases", "cache"})
        key = f"{hashlib.sha256(choices.encode()).hexdigest()[:16]}/{seed}"
        if key not in self.known:
            self.known[key] = round(min(200.0, self.sampler.psnr_db(plan, seed)), 2)
            self.path.write_text(json.dumps(self.known, indent=0) + "\n")
            print(f"  seed {seed}: {self.known[key]:.2f} dB", flush=True)
        value: float = self.known[key]
        return value

    def mean_db(self, plan: Plan, seeds: Sequence[int]) -> float:
        return statistics.fmean(self.psnr_db(plan, seed) for seed in seeds)


def search_stage(
    folder: Path, samples: Samples, goal_db: float, spec: LoopSpec, names: Sequence[str]
) -> dict[str, Any]:
    """A plan for each set of techniques, or why there is none."""
    found: dict[str, Any] = {}
    for name in names:
        techniques = SEARCHED[name]
        print(name, flush=True)
        options = SearchOptions(techniques=techniques, loop=spec)
        path = _plan_path(samples.work, name)
        try:
            plan = find_plan(
                folder,
                Goal(min_psnr_db=goal_db),
                path,
                workload=samples.workload,
                verify=samples,
                options=options,
            ).plan
        except GoalUnattainable as error:
            found[name] = {"unattainable": error.message}
            continue
        found[name] = {
            **_facts(plan),
            "samples_of_the_search": sum(len(v.seeds) for v in plan.verification),
            "audits": [
                v.model_dump(mode="json") for v in plan.verification if v.purpose == "audit"
            ],
        }
    return found


def quality_stage(
    folder: Path,
    samples: Samples,
    goal_db: float,
    tune: Sequence[int],
    wanted: Sequence[str],
) -> dict[str, Any]:
    """Every recipe with its best settings, by tune seeds."""
    profile, records = load_complete(folder)
    found: dict[str, Any] = {}
    for name, tried in _baselines(folder, profile, records, samples.workload, wanted):
        print(name, flush=True)
        chosen = _chosen(tried, samples, goal_db, tune)
        if chosen is None:
            found[name] = {"unattainable": f"none of {len(tried)} settings reaches {goal_db:g} dB"}
            continue
        settings, plan = chosen
        plan.save(_plan_path(samples.work, name))
        found[name] = {**_facts(plan), "settings": settings, "tried": len(tried)}
    return found


def audit_stage(samples: Samples, seeds: Sequence[int]) -> dict[str, Any]:
    """PSNR of every plan in the folder on the same seeds."""
    found: dict[str, Any] = {}
    for name, path in _plans(samples.work).items():
        print(f"audit of {name}", flush=True)
        plan = Plan.load(path)
        decibels = [samples.psnr_db(plan, seed) for seed in seeds]
        found[name] = {
            "seeds": list(seeds),
            "mean_db": round(statistics.fmean(decibels), 2),
            "min_db": min(decibels),
            "p10_db": round(float(np.percentile(decibels, 10)), 2),
        }
    return found


Tried = list[tuple[dict[str, Any], Plan]]


def _baselines(
    folder: Path,
    profile: Profile,
    records: Sequence[SeedRecord],
    workload: Workload,
    wanted: Sequence[str],
) -> Iterator[tuple[str, Tried]]:
    """Recipes with all plans that they may try, cheapest first where that is known."""
    caches = [name for name in recipe_names() if name in wanted]
    if caches:
        predictor, _ = predictor_of(folder, profile, records, SearchOptions())
        signals = record(workload, profile.seeds).signals
    for name in caches:
        recipe, best = Recipe.load(name), dict[int, tuple[float, dict[str, Any], Plan]]()
        for settings, schedule in recipe.variants(signals):
            try:
                plan = _cache_plan(profile, schedule)
            except DitoptError:
                continue  # a forecast too far ahead, which a plan refuses
            error = predictor.energies(plan).cache
            count = len(schedule.full)
            if count not in best or error < best[count][0]:
                best[count] = (error, settings, plan)
        yield recipe.name, [best[count][1:] for count in sorted(best)]
    for name in (name for name in AttentionRecipe.names() if name in wanted):
        attention = AttentionRecipe.load(name)
        tried: Tried = []
        for settings in attention.settings():
            try:
                tried.append((settings, attention.plan(profile, records, settings)))
            except DitoptError as error:
                print(f"{attention.name} {settings}: {error}", flush=True)
        yield attention.name, tried


def _chosen(
    tried: Tried, samples: Samples, goal_db: float, tune: Sequence[int]
) -> tuple[dict[str, Any], Plan] | None:
    """The cheapest that reaches the goal on tune seeds: fewest full calls, else lowest quality."""
    if tried and tried[0][1].cache is not None:
        low, high = -1, len(tried)  # quality rises with the number of full calls
        while high - low > 1:
            middle = (low + high) // 2
            if samples.mean_db(tried[middle][1], tune) >= goal_db:
                high = middle
            else:
                low = middle
        return tried[high] if high < len(tried) else None
    passing = [
        (decibels, number)
        for number, (_, plan) in enumerate(tried)
        if (decibels := samples.mean_db(plan, tune)) >= goal_db
    ]
    return tried[min(passing)[1]] if passing else None


def time_stage(
    workload: Workload, work: Path, rounds: int, names: Sequence[str] | None
) -> dict[str, Any]:
    """Plans side by side, compiled, the joint one always among them; medians of one loop."""
    plans = _plans(work)
    if names is not None:
        plans = {name: path for name, path in plans.items() if name in {*names, "joint"}}
    variants: dict[str, Any] = {"eager": lambda module: module, "torch.compile": torch.compile}
    for name, path in plans.items():
        options: Any = {"plan": Plan.load(path)}
        variants[name] = lambda module, options=options: torch.compile(
            module, backend="ditopt", options=options
        )
    seeds = range(AUDIT_SEED, AUDIT_SEED + rounds)
    result = bench(workload, seeds=seeds, variants=variants)
    ours = next(row.ms for row in result.rows if row.variant == "joint")
    return {
        "seeds": list(seeds),
        "failures": list(result.failures),
        "rows": [
            {
                "variant": row.variant,
                "ms": row.ms,
                "ms_iqr": row.ms_iqr,
                "psnr_db": row.psnr_db,
                "joint_is_faster": None if not (row.ms and ours) else round(row.ms / ours, 3),
            }
            for row in result.rows
        ],
    }


def take_part(part: Path, work: Path) -> dict[str, Any]:
    """Copy one process's plans into the common folder; its record."""
    for path in part.glob("plan *"):
        shutil.copy(path, work)
    result: dict[str, Any] = json.loads((part / "joint.json").read_text())
    return result


def merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each stage found, of all processes; times stay apart, each share has its own `joint`."""
    found: dict[str, Any] = {}
    for record_of_part in records:
        for stage in ("search", "quality", "audit"):
            if stage in record_of_part:
                found[stage] = found.get(stage, {}) | record_of_part[stage]
        for share in record_of_part.get("time_shares", [record_of_part.get("time")]):
            if share is not None:
                found.setdefault("time_shares", []).append(share)
    return found


def _cache_plan(profile: Profile, schedule: Any) -> Plan:
    return Plan(
        model=profile.model,
        sampler=profile.sampler,
        hardware=profile.hardware,
        phases=(Phase(calls=(0, profile.sampler.calls)),),
        cache=cache_section(schedule),
    )


def _facts(plan: Plan) -> dict[str, Any]:
    last, predicted = plan.phases[-1], plan.predicted
    return {
        "full_calls": len(plan.cache.full) if plan.cache else plan.sampler.calls,
        "dense_calls": last.calls[0],
        "sparse_sites": len(last.attention) + len(last.selectors),
        "linear_layers": len(last.linear),
        "predicted": None if predicted is None else predicted.model_dump(mode="json"),
    }


def _plans(work: Path) -> dict[str, Path]:
    return {path.stem.removeprefix("plan "): path for path in sorted(work.glob("plan *.yaml"))}


def _plan_path(work: Path, name: str) -> Path:
    return work / f"plan {name.replace('/', ' ')}.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path, help="what `ditopt profile --linears` wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder for plans and samples")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workload", help="another one than the embedded model's")
    parser.add_argument("--device", help="sample in float32 on this device (not with `time`)")
    parser.add_argument("--min-psnr", type=float, default=30.0)
    parser.add_argument("--tune-seeds", type=int, default=2)
    parser.add_argument("--audit-seeds", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="of `time`")
    parser.add_argument("--only", nargs="+", help="names of searches or recipes; all by default")
    parser.add_argument("--parts", nargs="+", type=Path, help="work folders that `merge` reads")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    workload = load_workload(options.workload) if options.workload else example(options.device)
    samples = Samples(workload, options.work)
    tune = range(TUNE_SEED, TUNE_SEED + options.tune_seeds)
    audit = range(AUDIT_SEED, AUDIT_SEED + options.audit_seeds)
    if options.stage == "search":
        spec = LoopSpec(tune_seeds=options.tune_seeds, audit_seeds=options.audit_seeds)
        names = [name for name in SEARCHED if name in (options.only or SEARCHED)]
        found = search_stage(options.profile, samples, options.min_psnr, spec, names)
    elif options.stage == "quality":
        names = options.only or [*recipe_names(), *AttentionRecipe.names()]
        found = quality_stage(options.profile, samples, options.min_psnr, tune, names)
    elif options.stage == "audit":
        found = audit_stage(samples, audit)
    elif options.stage == "time":
        found = time_stage(workload, options.work, options.rounds, options.only)
    (model,) = workload.models.values()
    kept = options.work / "joint.json"
    result = json.loads(kept.read_text()) if kept.exists() else {}
    if options.stage == "merge":
        found = merged([result, *map(take_part, options.parts, repeat(options.work))])
    else:
        found = {options.stage: found}
    result |= {
        "environment": describe_environment(next(model.parameters()).device),
        "workload": workload.title,
        "goal_db": options.min_psnr,
        "profile_seeds": list(Profile.load(options.profile).seeds),
        **found,
    }
    for path in (kept, options.output):
        if path is not None:
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
