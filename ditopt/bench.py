"""Eager, `torch.compile`, ditopt and ditopt with a plan, side by side on one workload.

In each round every variant runs the whole sampling loop once on the same seed, so that time and
quality come from the same runs and whatever else the machine does meets all variants. Speeds are
withheld when a variant fails the correctness gate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt.bench_gate import gate
from ditopt.bench_result import BenchResult, Row
from ditopt.environment import describe_environment
from ditopt.errors import WorkloadError
from ditopt.metrics import Quality, compare, summarize
from ditopt.progress import Progress, silent
from ditopt.runtime import stats
from ditopt.timing import PeakMemory, Spread, always_compiled, timed
from ditopt.workload import Denoiser, Workload

if TYPE_CHECKING:
    from ditopt.plan import Plan

Variant = Callable[[nn.Module], Denoiser]
"""Makes the callable that stands for one denoiser in the sampling loop."""

Observe = Callable[[str, int, Tensor], None]
"""`observe(variant, seed, result)`."""

FIRST_SEED = 5000
"""Where default seeds start: a profile uses small numbers, a search those from 1000."""

MIN_ROUNDS = 3
"""Fewer samples have no spread; seeds take turns until there are as many."""

DEFAULT_SEEDS = tuple(range(FIRST_SEED, FIRST_SEED + MIN_ROUNDS))


class _Runs:
    """What one variant did: results are compared and dropped, numbers kept."""

    def __init__(self, workload: Workload, variant: Variant) -> None:
        self._workload = workload
        self._models = {name: variant(module) for name, module in workload.models.items()}
        self._memory = PeakMemory(_device(workload))
        self.first_ms = 0.0
        self.samples_ms: list[float] = []
        self.qualities: list[Quality] = []
        self.peak_bytes: int | None = None
        self.ran: dict[str, Any] = {}

    def compile(self, seed: int) -> None:
        """The first loop, with empty compiler caches of its own."""
        from torch._inductor.utils import fresh_cache  # slow to import, needed once

        with fresh_cache():
            _, self.first_ms = timed(lambda: self._workload.run(seed, self._models))

    def run(self, seed: int) -> Tensor:
        """One timed and counted loop."""
        before = self._counters()
        self._memory.start()
        result, elapsed_ms = timed(lambda: self._workload.run(seed, self._models))
        peak = self._memory.peak_bytes()
        self.samples_ms.append(elapsed_ms)
        if peak is not None:
            self.peak_bytes = max(peak, self.peak_bytes or 0)
        self.ran = _added(self.ran, _added(self._counters(), before, sign=-1))
        return result

    def _counters(self) -> dict[str, Any]:
        counters = dict(stats(self._workload.models))
        del counters["compiled"]  # how many callables there are, not what ran
        return counters

    def row(self, name: str, seeds: Sequence[int], *, withheld: bool) -> Row:
        spread, quality = Spread.of(self.samples_ms), summarize(self.qualities)
        compile_s = max(0.0, self.first_ms - spread.median_ms) / 1e3
        return Row(
            variant=name,
            ms=None if withheld else spread.median_ms,
            ms_iqr=None if withheld else spread.iqr_ms,
            psnr_db=_finite(quality.mean_psnr_db),
            psnr_min_db=_finite(quality.min_psnr_db),
            ssim=quality.ssim,
            max_error=quality.max_error,
            compile_s=compile_s,
            peak_bytes=self.peak_bytes,
            seeds=tuple(seeds),
            ran=self.ran,
        )


def bench(
    workload: Workload,
    plan: Plan | str | Path | None = None,
    *,
    seeds: Sequence[int] | None = None,
    variants: Mapping[str, Variant] | None = None,
    engine_plan: Plan | None = None,
    observe: Observe | None = None,
    progress: Progress = silent,
) -> BenchResult:
    """Measure the variants of a workload side by side.

    Each round runs every variant once on one seed. Compiled code of earlier calls in this process
    is dropped first (`torch.compiler.reset()`), so that compile times are those of a cold start.

    Args:
        workload: the model and its loop.
        plan: adds the variant `ditopt+plan`.
        seeds: quality is measured once on each; by default the plan's audit seeds, which its
            search never saw, or three seeds where there is no plan.
        variants: what to measure instead of the usual four; must hold `eager`, the reference.
        engine_plan: what the variant `engine`, where there is one, was exported with.
        observe: is shown each seed's results.
        progress: told after each round.

    Raises:
        WorkloadError: no seeds, or a loop without a finite result.
    """
    if isinstance(plan, str | Path):
        from ditopt.plan import Plan as PlanFile  # plan.py imports this package's patterns

        plan = PlanFile.load(plan)
    chosen = _seeds(plan or engine_plan) if seeds is None else tuple(seeds)
    if not chosen:
        raise WorkloadError("bench needs at least one seed, got none")
    runs = {
        name: _Runs(workload, variant)
        for name, variant in (variants or default_variants(plan)).items()
    }
    torch.compiler.reset()
    with always_compiled():
        for number, one in enumerate(runs.values()):
            progress("compiling", number, len(runs))
            one.compile(chosen[0])
        progress("compiling", len(runs), len(runs))
        _sample(runs, chosen, workload.data_range, observe, progress)

    quality = {name: summarize(one.qualities) for name, one in runs.items()}
    failures = gate(quality, plan, engine_plan)
    rows = tuple(one.row(name, chosen, withheld=bool(failures)) for name, one in runs.items())
    environment = {
        **describe_environment(_device(workload)),
        "workload": workload.title,
        "data_range": workload.data_range,
        "plan_goal": None if plan is None or plan.goal is None else str(plan.goal),
    }
    return BenchResult(environment, rows, tuple(failures))


def _sample(
    runs: Mapping[str, _Runs],
    seeds: Sequence[int],
    data_range: float | None,
    observe: Observe | None,
    progress: Progress,
) -> None:
    """The interleaved rounds."""
    order, shuffle = list(runs), random.Random(0)
    rounds = max(MIN_ROUNDS, len(seeds))
    for number in range(rounds):
        seed = seeds[number % len(seeds)]
        results = {name: runs[name].run(seed) for name in order}
        shuffle.shuffle(order)  # nobody always runs after the same neighbour
        progress("sampling", number + 1, rounds)
        if number >= len(seeds):
            continue  # timed again, but seen already
        for name, result in results.items():
            runs[name].qualities.append(compare(result, results["eager"], data_range))
            if observe is not None:
                observe(name, seed, result)


def default_variants(plan: Plan | None) -> dict[str, Variant]:
    """The usual three, and `ditopt+plan` where there is a plan."""
    variants: dict[str, Variant] = {
        "eager": lambda module: module,
        "inductor": torch.compile,
        "ditopt": lambda module: torch.compile(module, backend="ditopt"),
    }
    if plan is not None:
        options: Any = {"plan": plan}
        variants["ditopt+plan"] = lambda module: torch.compile(
            module, backend="ditopt", options=options
        )
    return variants


def _seeds(plan: Plan | None) -> tuple[int, ...]:
    audits = [v for v in plan.verification if v.purpose == "audit" and v.adopted] if plan else []
    return audits[-1].seeds if audits else DEFAULT_SEEDS


def _device(workload: Workload) -> torch.device:
    parameters = (p for module in workload.models.values() for p in module.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))


def _finite(decibels: float) -> float | None:
    return None if math.isinf(decibels) else decibels


def _added(left: Mapping[str, Any], right: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """Counters added (or subtracted) key by key, nested ones too."""
    total: dict[str, Any] = dict(left)
    for key, value in right.items():
        if isinstance(value, Mapping):
            total[key] = _added(total.get(key, {}), value, sign)
        else:
            total[key] = total.get(key, 0) + sign * value
    return total
