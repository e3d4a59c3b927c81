"""Predicted against measured quality of random plans of the embedded video model.

    python benchmarks/prediction.py PROFILE --work DIR --output results/prediction_cpu.json

Plans mix cache schedules, head patterns and int8 layers at random; their predicted PSNR is spread
over 20 to 40 dB. Each is sampled on the same seeds, which no profile has seen. Predictions are
those that a search starts from: nothing is fitted to these plans. Measurements are kept in DIR, one
by one, so that an interrupted run goes on; `--stage predict` only predicts what was measured.

PSNR needs no timing, so plans run without compilation (`ditopt_eager`), beside other work, and
with `--device cuda` on a GPU in the CPU's float32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from ditopt.demo import demo_workload
from ditopt.environment import describe_environment
from ditopt.metrics import psnr
from ditopt.plan import Phase, Plan
from ditopt.profiling.schema import load_complete
from ditopt.search.exchange import cache_section
from ditopt.search.run import SearchOptions, predictor_of, starting_model
from ditopt.workload import Workload, load_workload

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule
    from ditopt.search.prediction import Predictor

FIRST_SEED = 3000
LOWEST_DB, HIGHEST_DB = 20.0, 40.0
MIDDLE_DB = (25.0, 35.0)
DENSE_SHARES = (0.1, 0.2, 0.3)


class Maker:
    """Random plans, the same for the same profile and number."""

    def __init__(self, predictor: Predictor, gains: Any, data_range: float) -> None:
        self.predictor, self.profile = predictor, predictor.profile
        self.gains, self.data_range = gains, data_range
        calls = self.profile.sampler.calls
        self.schedules = []
        for count in range(4, calls):
            for tried, schedule in enumerate(predictor.stack.schedules(count)):
                if tried == 12:
                    break
                error = self._level_db(self._plan(schedule=schedule))
                self.schedules.append((error, schedule))

    def plan(self, number: int, count: int) -> tuple[Plan, float]:
        """A plan, and the PSNR that it was made for."""
        rng = np.random.default_rng([0, number])
        wanted_db = LOWEST_DB + (HIGHEST_DB - LOWEST_DB) * (number + 0.5) / count
        kinds = [("cache",), ("attention",), ("cache", "attention")]
        kind = kinds[int(rng.choice(3, p=(0.3, 0.15, 0.55)))]
        parts = dict(zip(kind, rng.dirichlet(np.ones(len(kind))), strict=True))
        calls = self.profile.sampler.calls
        start = math.ceil(float(rng.choice(DENSE_SHARES)) * calls)
        schedule, rules = None, {}
        if "cache" in parts:
            level_db = wanted_db - 10 * math.log10(parts["cache"])
            near = sorted(self.schedules, key=lambda item: abs(item[0] - level_db))[:10]
            schedule = near[int(rng.integers(len(near)))][1]
        if "attention" in parts:
            level_db = wanted_db - 10 * math.log10(parts["attention"])
            rules = self._rules(rng, level_db, start)
        linear = self._linear(rng, float(rng.choice((0.0, 0.5, 1.0))))
        return self._plan(schedule, rules, start, linear), wanted_db

    def _rules(self, rng: np.random.Generator, level_db: float, start: int) -> dict[str, Any]:
        """Patterns of heads: a noisy choice by error and time, at a price that fits the level."""
        sites = self.predictor.attention.sites(0, start)
        noise = {
            s.id: np.exp(rng.standard_normal((s.heads, len(self.profile.options)))) for s in sites
        }

        def rules(price: float) -> dict[str, Any]:
            found = {}
            for site in sites:
                drop = site.alternatives[1]
                cost = drop.option_ms + price * drop.error * noise[site.id][:, list(drop.options)]
                picked = [drop.options[int(k)] for k in cost.argmin(axis=1)]
                found[site.id] = tuple(self.profile.options[k].pattern for k in picked)
            return found

        high, low = 1e9, 1e-6
        for _ in range(50):
            middle = math.sqrt(high * low)
            if self._level_db(self._plan(None, rules(middle), start)) >= level_db:
                high = middle
            else:
                low = middle
        return rules(high)

    def _linear(self, rng: np.random.Generator, share: float) -> dict[str, Any]:
        linears = self.predictor.linears
        if linears is None:
            return {}
        rule = next(r for r in linears.profile.rules if r.format == "int8_row")
        return {
            member: rule
            for group in linears.profile.groups
            if rng.random() < share
            for member in group.members
        }

    def _plan(
        self,
        schedule: CacheSchedule | None = None,
        rules: dict[str, Any] | None = None,
        start: int = 1,
        linear: dict[str, Any] | None = None,
    ) -> Plan:
        profile, linears = self.profile, self.predictor.linears
        records = linears.profile.records if linears is not None else ()
        calls = profile.sampler.calls
        first = Phase(calls=(0, start), linear=linear or {})
        rest = Phase(calls=(start, calls), attention=rules or {}, linear=linear or {})
        return Plan(
            model=profile.model.model_copy(update={"linears": records}),
            sampler=profile.sampler,
            hardware=profile.hardware,
            layout=profile.layout,
            block=profile.block,
            phases=(first, rest),
            cache=cache_section(schedule) if schedule is not None else None,
        )

    def _level_db(self, plan: Plan) -> float:
        energies = self.predictor.energies(plan)
        energy = sum(g * e for g, e in zip(self.gains, energies, strict=True))
        return -10 * math.log10(max(energy, 1e-30) / self.data_range**2)


class PlanSampler:
    """PSNR of seeds under plans, without compilation; the last plan's capture is used again."""

    def __init__(self, workload: Workload, work: Path) -> None:
        self.workload, self.work = workload, work
        self.plan: Plan | None = None
        self.captured: Any = None

    @torch.no_grad()
    def psnr_db(self, plan: Plan, seed: int) -> float:
        if plan is not self.plan:
            torch.compiler.reset()
            (model,) = self.workload.models.values()
            options: Any = {"plan": plan}
            self.captured = torch.compile(model, backend="ditopt_eager", options=options)
            self.plan = plan
        dense = dense_result(self.workload, self.work, seed)
        result = self.workload.run(seed, dict.fromkeys(self.workload.models, self.captured))
        return psnr(result.cpu(), dense, self.workload.data_range)


def example(device: str | None) -> Workload:
    """The embedded model as `ditopt demo` takes it, or in float32 on a device."""
    if device is None:
        return load_workload(demo_workload())
    sys.path.append(str(Path(demo_workload()).parents[1]))
    from tiny_video.workload import workload

    torch.backends.cudnn.allow_tf32 = False
    made: Workload = workload(device=device, dtype=torch.float32)
    return made


def measure(maker: Maker, workload: Workload, work: Path, count: int, seeds: Sequence[int]) -> None:
    """Every plan on all seeds; what is there is not sampled again."""
    sampler = PlanSampler(workload, work)
    kept = work / "measured.json"
    measured: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    order = np.random.default_rng(0).permutation(count)
    for done, number in enumerate(order):
        path = work / f"plan_{number:02d}.yaml"
        if not path.exists():
            maker.plan(int(number), count)[0].save(path)
        plan = Plan.load(path)
        for seed in seeds:
            if str(seed) in measured.get(str(number), {}):
                continue
            started = time.perf_counter()
            decibels = sampler.psnr_db(plan, seed)
            measured.setdefault(str(number), {})[str(seed)] = decibels
            kept.write_text(json.dumps(measured, indent=1) + "\n")
            seconds = time.perf_counter() - started
            print(
                f"seed {seed}: {done + 1} of {count}: plan {number}: {decibels:.2f} dB, "
                f"{seconds:.0f} s",
                flush=True,
            )


def dense_result(workload: Workload, work: Path, seed: int) -> torch.Tensor:
    path = work / f"dense_{seed}.safetensors"
    if not path.exists():
        save_file({"result": workload.run(seed).cpu().contiguous()}, path)
    return load_file(path)["result"]


def predict(predictor: Predictor, work: Path, data_range: float) -> dict[str, Any]:
    """Predictions for everything measured, and how well they rank it."""
    model = starting_model(data_range)
    measured = json.loads((work / "measured.json").read_text())
    rows = []
    for number, by_seed in sorted(measured.items(), key=lambda item: int(item[0])):
        plan = Plan.load(work / f"plan_{int(number):02d}.yaml")
        energies = predictor.energies(plan)
        last = plan.phases[-1]
        rows.append(
            {
                "plan": int(number),
                "predicted_db": round(model.psnr_db(energies), 2),
                "measured_db": round(statistics.fmean(by_seed.values()), 2),
                "by_seed_db": [round(value, 2) for value in by_seed.values()],
                "parts_db": {
                    name: round(-10 * math.log10(gain * part / data_range**2), 2)
                    for name, gain, part in zip(
                        energies._fields, model.gains, energies, strict=True
                    )
                    if part > 0
                },
                "full_calls": len(plan.cache.full) if plan.cache else plan.sampler.calls,
                "dense_calls": last.calls[0],
                "sparse_sites": len(last.attention),
                "int8_layers": len(last.linear),
            }
        )
    return {"gains_db": model.gains_db._asdict(), **_ranked(rows), "plans": rows}


def _ranked(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def of(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs = [(row["predicted_db"], row["measured_db"]) for row in chosen]
        if len(pairs) < 3:
            return {"plans": len(pairs)}
        misses = [p - m for p, m in pairs]
        return {
            "plans": len(pairs),
            "spearman": round(float(spearmanr(*zip(*pairs, strict=True))[0]), 3),
            "bias_db": round(statistics.fmean(misses), 2),
            "spread_db": round(statistics.stdev(misses), 2),
        }

    low, high = MIDDLE_DB
    return {
        "all": of(rows),
        "20 to 40 dB": of([r for r in rows if LOWEST_DB <= r["measured_db"] <= HIGHEST_DB]),
        "25 to 35 dB": of([r for r in rows if low <= r["measured_db"] <= high]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path, help="what `ditopt profile --linears` wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder for plans and samples")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stage", choices=("all", "predict"), default="all")
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", help="float32 on this device, in place of the demo's choice")
    options = parser.parse_args()
    workload = example(options.device)
    data_range = workload.data_range or 2.0
    predictor, _ = predictor_of(options.profile, *load_complete(options.profile), SearchOptions())
    options.work.mkdir(parents=True, exist_ok=True)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    if options.stage == "all":
        maker = Maker(predictor, starting_model(data_range).gains, data_range)
        measure(maker, workload, options.work, options.plans, seeds)
    (model,) = workload.models.values()
    result = {
        "environment": describe_environment(next(model.parameters()).device),
        "workload": workload.title,
        "profile_seeds": list(predictor.profile.seeds),
        "seeds": list(seeds),
        "plans_wanted": options.plans,
        **predict(predictor, options.work, data_range),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "plans"}, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
