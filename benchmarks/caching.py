"""Step caching: quality of schedules on the trained model, speed of loops at published shapes.

    python benchmarks/caching.py quality --dtype float32 --output quality.json
    python benchmarks/caching.py speed --models dit-xl flux wan --output speed.json
    python benchmarks/caching.py merge quality.json speed.json --output results/caching_h200.json

Quality: residuals of the profile seeds give the planned schedules and every baseline, all brought
to the same number K of full calls; each is sampled for real, on seeds that no planning has seen,
against the dense result of eager PyTorch. One compiled program serves all schedules.

Speed: whole loops with random weights against the bound T / (K + (T - K) s), where s is the share
of a full call that a skip call takes, side by side with torch.compile. Speeds are printed only
where a skip call reproduces a full call of the same inputs (see `gate`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import ditopt
from ditopt.caching import (
    CacheSchedule,
    at_budget,
    evenly_spaced,
    fit_row,
    fit_rows,
    forced_calls,
    forecast_error,
    magcache,
    relative_change,
    search_schedules,
    smoothcache,
    taylor_row,
    taylorseer,
    teacache,
)
from ditopt.environment import describe_environment
from ditopt.errors import PlanError
from ditopt.metrics import psnr
from ditopt.plan import Cache, Hardware, ModelRecord, Phase, Plan, Sampler
from ditopt.runtime import StepRuntime, StepSchedule, TrajectoryTracker, cache_bytes
from ditopt.runtime.forecast import forecast
from ditopt.timing import Spread, synchronize, timed

HERE = Path(__file__).resolve().parent
DATE = "2026-11-21"
PROFILE_SEEDS, TUNE_SEEDS, AUDIT_SEEDS = range(4), range(1000, 1002), range(2000, 2008)
BUDGETS = range(4, 15)
PUBLISHED = {"flux": 3.17, "dit-xl": 2.36, "wan": 4.14}
"""Speedups that Confidence-Gated Taylor (arXiv 2508.02240) reports."""

# ---------------------------------------------------------------------------- schedules


def first_block_cache(changes: Tensor, threshold: float) -> CacheSchedule:
    """First-Block Cache's decisions on recorded residuals, with reuse of the whole stack.

    The original recomputes the first block at each skip call, which no schedule can say.

    Args:
        changes: [T, T] relative L1 change of the first block's residual from call s to t at [s, t].
        threshold: at which a call is full.
    """
    full = [0]
    for call in range(1, changes.shape[0]):
        if not float(changes[full[-1], call]) < threshold:
            full.append(call)
    return reusing(changes.shape[0], full)


def reusing(calls: int, full: Sequence[int]) -> CacheSchedule:
    rows = {call: (1.0,) for call in range(calls) if call not in set(full)}
    return CacheSchedule(calls, tuple(full), rows)


def taylor_even(calls: int, budget: int, *, order: int, first: int = 3) -> CacheSchedule:
    """TaylorSeer's rows with exactly `budget` full calls: the first ones, the others even."""
    first = min(first, budget)
    rest = budget - first
    full = [*range(first), *(first + (k + 1) * (calls - first) // (rest + 1) for k in range(rest))]
    rows = {}
    for call in sorted(set(range(calls)) - set(full)):
        stored = [float(source) for source in reversed(full) if source < call]
        rows[call] = taylor_row(float(call), stored, order)
    return CacheSchedule(calls, tuple(full), rows)


def spread_pairs(calls: int, budget: int) -> CacheSchedule:
    """Even full calls, two of them at the start, and rows over two: for measuring speed."""
    rest = max(1, budget - 1)
    full = sorted({0, *(1 + k * (calls - 1) // rest for k in range(budget - 1))})
    rows = {call: (1.5, -0.5) for call in range(calls) if call not in full}
    return CacheSchedule(calls, tuple(full), rows)


def within(limits: Sequence[int], make: Callable[[int], CacheSchedule]) -> CacheSchedule | None:
    """The first schedule that its limit on skips in a row allows."""
    for limit in limits:
        with contextlib.suppress(PlanError):
            return make(limit)
    return None


def planned_coherent(
    gram: Tensor, amplitudes: Sequence[float], *, forced: Sequence[int], history: int = 2
) -> list[CacheSchedule]:
    """As `search_schedules`, but errors of skips in a row add up before they are squared.

    Neighbouring forecasts err in the same direction and a sampler sums what the model returns, so
    a span of skips costs `|sum_t a_t (R_t - forecast_t)|^2`, again exact from the Gram matrix.
    """
    calls, must = gram.shape[0], {0, *forced}
    gram = gram.double()

    def spans(previous: int | None, last: int) -> Iterator[tuple[int, float]]:
        """(next full call, cost of the skips before it); T ends the loop."""
        error = torch.zeros(calls, dtype=torch.float64)
        yield last + 1, 0.0
        for call in range(last + 1, calls):
            if call in must:
                return
            sources = [last] if previous is None or history == 1 else [last, previous]
            error[call] += amplitudes[call]
            for source, c in zip(sources, fit_row(gram, call, sources), strict=True):
                error[source] -= amplitudes[call] * c
            yield call + 1, max(0.0, float(error @ gram @ error))

    layer: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {(None, 0): (0.0, (0,))}
    table = {(None, 0): list(spans(None, 0))}
    found = []
    for _ in range(calls):
        following: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {}
        best: tuple[float, tuple[int, ...]] | None = None
        for state, (cost, full) in layer.items():
            if state not in table:
                table[state] = list(spans(*state))
            for end, more in table[state]:
                total = cost + more
                if end == calls:
                    best = min(best, (total, full)) if best is not None else (total, full)
                    continue
                key = (state[1], end)
                if key not in following or total < following[key][0]:
                    following[key] = (total, (*full, end))
        if best is not None:
            rows = fit_rows(gram, best[1], history=history)
            found.append(CacheSchedule(calls, best[1], rows, best[0]))
        layer = following
    return found


def relocations(full: Sequence[int], calls: int, forced: Sequence[int]) -> list[tuple[int, ...]]:
    """Every schedule in which one full call that is not forced has moved by up to three."""
    found = []
    for call in full:
        if call in forced or call == 0:
            continue
        for shift in (-1, 1, -2, 2, -3, 3):
            moved = call + shift
            if 0 < moved < calls and moved not in full:
                found.append(tuple(sorted({*full, moved} - {call})))
    return found


def refused(schedule: CacheSchedule) -> str | None:
    """Why the step runtime does not take a schedule: forecasts far ahead amplify too much."""
    try:
        schedule.to_steps()
    except PlanError as error:
        return error.message
    return None


def fewest_for(curve: Mapping[int, float], psnr_db: float) -> int | None:
    """Fewest full calls with at least this PSNR."""
    return min((k for k, value in curve.items() if value >= psnr_db), default=None)


def calls_for_speedup(speedup: float, calls: int, share: float) -> int:
    """Most full calls K with T / (K + (T - K) s) >= speedup; 0 where even one is too many."""
    return max(0, math.floor((calls / speedup - calls * share) / (1 - share) + 1e-9))


def bound(calls: int, full: int, share: float) -> float:
    return calls / (full + (calls - full) * share)


# ---------------------------------------------------------------------------- one program


class Exchangeable:
    """A compiled model whose schedule can be exchanged without compiling again."""

    def __init__(self, model: nn.Module, plan: Plan, backend: str, *, check: bool = True) -> None:
        self._plan, self.backend_name, self._check = plan, backend, check
        self.calls = plan.sampler.calls
        self.timesteps = plan.sampler.timesteps or None
        self.outputs: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.runtime: StepRuntime | None = None
        self.model = torch.compile(model, backend=self._backend)

    def _backend(self, gm: Any, inputs: Any) -> Callable[..., Any]:
        from ditopt.config import Options
        from ditopt.linker import Linker
        from ditopt.torch_backend import compile_graph

        patch: Any = contextlib.nullcontext()
        if not self._check:  # fingerprints of random weights
            patch = mock.patch.object(Linker, "_check", return_value=None)
        with patch:
            self.compiled = compile_graph(gm, inputs, Options(plan=self._plan), self.backend_name)
        self.programs = self.compiled.programs
        self.use(None)
        return lambda *args: self.runtime(*args)  # type: ignore[misc]

    def use(
        self, schedule: CacheSchedule | None, *, timesteps: bool = True, **options: Any
    ) -> None:
        """Run this schedule from now on, None: every call in full."""
        steps = None
        if schedule is not None and schedule.rows:
            steps = schedule.to_steps(timesteps=self.timesteps if timesteps else None)
        tracker = None if steps is None else TrajectoryTracker(steps)
        self.runtime = StepRuntime(self.programs, steps, tracker, **options)

    def note_outputs(self) -> Callable[..., Any]:
        """From now on note the shapes that the block stack returns."""
        body = self.programs.body

        def noting(*args: Any) -> Any:
            outputs = body(*args)
            self.outputs = [(tuple(output.shape), output.dtype) for output in outputs]
            return outputs

        self.programs = replace(self.programs, body=noting)
        return body

    @property
    def counters(self) -> tuple[int, int]:
        assert self.runtime is not None
        counters = self.runtime.artifact.counters
        return counters.full, counters.skipped


def plan_with(sampler: Sampler, schedule: CacheSchedule, **parts: Any) -> Plan:
    record = ModelRecord(architecture="0" * 64, weights="0" * 64, name="model", sites=())
    hardware = Hardware(device="cuda", name="-", torch=torch.__version__, threads=1)
    history = max(len(row) for row in schedule.rows.values())
    cache = Cache(full=schedule.full, history=history, coefficients=dict(schedule.rows))
    defaults = {"model": record, "hardware": hardware}
    phases = (Phase(calls=(0, sampler.calls)),)
    return Plan(sampler=sampler, phases=phases, cache=cache, **{**defaults, **parts})


# ---------------------------------------------------------------------------- quality


class Recording:
    """What the profile seeds show: residuals as the search sees them, and the baselines' signals.

    Attributes:
        gram, hidden, steps: [T, T], [T], [T], summed (mean for `steps`) over the seeds.
        grams: one for each seed.
        first_block: [T, T] relative L1 change of the first block's residual, mean over seeds.
        modulated: [T] relative L1 change of the first block's modulated input from call to call.
        output: [T] relative L2 change of the stack's residual since the call before.
    """

    def __init__(self, workload: Any, seeds: Sequence[int]) -> None:
        from ditopt import fingerprint
        from ditopt.observe import observe
        from ditopt.plan import Block
        from ditopt.profiling.loops import observed_loop, plain_loop, sampler_of
        from ditopt.profiling.observer import ProfileObserver
        from ditopt.profiling.run import describe_hardware

        trace, _ = plain_loop(workload)
        self.sampler = sampler_of(trace)
        calls = self.sampler.calls
        observer = ProfileObserver(None, Block(), calls, (), trace.branches, 1 << 32)
        observed = observe(workload.model, observer)
        records = [observed_loop(workload, seed, trace, observer, observed) for seed in seeds]
        torch.compiler.reset()
        self.grams = [record.gram for record in records]
        self.gram = torch.stack(self.grams).sum(0)
        self.hidden = torch.stack([record.hidden_energy for record in records]).sum(0)
        self.steps = torch.stack([record.step_energy for record in records]).mean(0)
        self.model = ModelRecord(
            architecture=fingerprint.architecture(workload.model),
            weights=fingerprint.weights(workload.model),
            name=type(workload.model).__name__,
            sites=tuple(observer.sites.values()),
        )
        self.hardware = describe_hardware(next(workload.model.parameters()).device)
        signals = [_first_block_signals(workload, seed) for seed in seeds]
        self.first_block = torch.stack([first for first, _ in signals]).mean(0)
        self.modulated = torch.stack([modulated for _, modulated in signals]).mean(0).tolist()
        self.output = [0.0, *relative_change(self.gram).diagonal(1).tolist()]
        energy = self.gram.diagonal()
        self.magnitudes = [1.0, *(energy[1:] / energy[:-1]).sqrt().tolist()]
        self.polynomial = np.polyfit(self.modulated[1:], self.output[1:], 4).tolist()


def _first_block_signals(workload: Any, seed: int) -> tuple[Tensor, Tensor]:
    residuals: list[Tensor] = []
    modulated: list[Tensor] = []
    block = workload.model.blocks[0]
    hooks = [
        block.register_forward_hook(lambda _, args, out: residuals.append(out - args[0])),
        block.attn1.register_forward_pre_hook(lambda _, args: modulated.append(args[0].clone())),
    ]
    workload.run(seed)
    for hook in hooks:
        hook.remove()

    def change(now: Tensor, then: Tensor) -> float:
        return float((now.float() - then.float()).abs().mean() / then.float().abs().mean())

    changes = torch.tensor([[change(now, then) for now in residuals] for then in residuals])
    steps = [0.0, *(change(now, then) for then, now in pairwise(modulated))]
    return changes, torch.tensor(steps)


def baselines(recording: Recording, budget: int) -> dict[str, CacheSchedule | None]:
    """Each recipe with the most full calls within `budget`; None where it cannot skip so much."""
    calls = recording.sampler.calls
    change = relative_change(recording.gram)
    limits = range(3, calls)

    def tea(polynomial: Sequence[float]) -> CacheSchedule:
        return at_budget(lambda d: teacache(recording.modulated, d, polynomial=polynomial), budget)

    def taylor(order: int, first: int) -> CacheSchedule:
        return at_budget(
            lambda d: taylorseer(calls, 1 + int(d), order=order, first=first),
            budget,
            highest=calls,
        )

    return {
        "uniform reuse": evenly_spaced(calls, budget),
        "TeaCache": tea((1.0, 0.0)),
        "TeaCache, fitted polynomial": within([0], lambda _: tea(recording.polynomial)),
        "First-Block Cache": at_budget(
            lambda d: first_block_cache(recording.first_block, d), budget
        ),
        "MagCache": within(
            limits,
            lambda n: at_budget(lambda d: magcache(recording.magnitudes, d, max_skips=n), budget),
        ),
        "SmoothCache": within(
            limits, lambda n: at_budget(lambda d: smoothcache(change, d, lookahead=n), budget)
        ),
        "TaylorSeer, order 1": within([3, 2], lambda first: taylor(1, first)),
        "TaylorSeer, order 2": within([3, 2], lambda first: taylor(2, first)),
        "TaylorSeer order 1, even": taylor_even(calls, budget, order=1),
        "TaylorSeer order 2, even": taylor_even(calls, budget, order=2),
    }


class Sampled:
    """Samples schedules and remembers what it has measured."""

    def __init__(self, workload: Any, recording: Recording, backend: str) -> None:
        self.workload = workload
        calls = recording.sampler.calls
        start = plan_with(
            recording.sampler,
            reusing(calls, range(0, calls, 2)),
            model=recording.model,
            hardware=recording.hardware,
        )
        self.program = Exchangeable(workload.model, start, backend)
        self._known: dict[Any, Tensor | float] = {}
        self._references: dict[tuple[str, int], Tensor] = {}
        self.rollouts = 0

    def run(self, schedule: CacheSchedule | None, seed: int) -> Tensor:
        if self.program.runtime is not None:
            self.program.use(schedule)
        with ditopt.session(calls=self.program.calls):
            result: Tensor = self.workload.run(seed, {"model": self.program.model})
        self.rollouts += 1
        if schedule is not None:
            expected = (len(schedule.full), self.program.calls - len(schedule.full))
            found = self.program.counters if schedule.rows else expected
            assert found == expected, f"{found} full and skipped calls, expected {expected}"
        return result

    def reference(self, kind: str, seed: int) -> Tensor:
        """The dense result in eager PyTorch, or by the compiled program."""
        if (kind, seed) not in self._references:
            result = self.workload.run(seed) if kind == "eager" else self.run(None, seed)
            self._references[kind, seed] = result
        return self._references[kind, seed]

    def psnrs(
        self, schedule: CacheSchedule, seeds: Sequence[int], against: str = "eager"
    ) -> list[float]:
        found = []
        for seed in seeds:
            key = (schedule.full, tuple(sorted(schedule.rows.items())), seed, against)
            if key not in self._known:
                reference = self.reference(against, seed)
                result = self.run(schedule, seed)
                value = psnr(result, reference, self.workload.data_range)
                self._known[key] = min(value, 200.0)
            found.append(self._known[key])
        return found


def measured_weights(sampled: Sampled, recording: Recording, seeds: Sequence[int]) -> list[float]:
    """[T] squared error of the final result for each squared error of one call's residual.

    One loop with a single skip for each call and seed, as HarmoniCa (arXiv 2410.01723) weighs
    timesteps. What a step's size, guidance and later calls make of an error is all in it.
    """
    calls = recording.sampler.calls
    weights = []
    for call in range(calls):
        gain = 0.0
        for seed in seeds:
            # Like the step before it where a skip has too little behind it.
            at = max(2, call)
            sources = [at - 1, at - 2]
            row = fit_row(recording.gram, at, sources)
            full = tuple(c for c in range(calls) if c != at)
            db = sampled.psnrs(CacheSchedule(calls, full, {at: row}), [seed], "compiled")[0]
            error = forecast_error(recording.grams[seed], at, sources, row)
            gain += 10 ** (-db / 10) / max(error, 1e-30)
        weights.append(gain / len(seeds))
    return weights


def polish(
    sampled: Sampled,
    gram: Tensor,
    starts: Sequence[CacheSchedule],
    forced: Sequence[int],
    seeds: Sequence[int],
    trials: int,
) -> CacheSchedule:
    """Hill climbing by real rollouts over single relocations (BudCache, arXiv 2606.13496)."""
    calls, left = gram.shape[0], trials

    def score(schedule: CacheSchedule) -> float:
        return statistics.fmean(sampled.psnrs(schedule, seeds, "compiled"))

    def refit(full: tuple[int, ...]) -> CacheSchedule:
        return CacheSchedule(calls, full, fit_rows(gram, full, history=2))

    best = max(starts, key=score)
    value, moved = score(best), True
    while moved and left > 0:
        moved = False
        for full in relocations(best.full, calls, forced):
            if left <= 0:
                break
            left -= 1
            candidate = refit(full)
            if (found := score(candidate)) > value:
                best, value, moved = candidate, found, True
                break
    return best


def quality(
    arguments: argparse.Namespace, device: torch.device, publish: Callable[[dict[str, Any]], None]
) -> None:
    sys.path.insert(0, str(HERE.parent / "examples"))
    from tiny_video.workload import workload as make

    started = time.perf_counter()
    dtype = getattr(torch, arguments.dtype)
    steps = {"steps": arguments.steps} if arguments.steps else {}
    workload = make(device=device.type, dtype=dtype, **steps)
    if arguments.tiny:
        workload = _small(workload, **steps)
    profile_seeds = list(PROFILE_SEEDS)[: arguments.seeds]
    audit = list(AUDIT_SEEDS)[: arguments.seeds * 2]
    recording = Recording(workload, profile_seeds)
    calls, gram = recording.sampler.calls, recording.gram
    sampled = Sampled(workload, recording, arguments.backend)
    compiled = [
        min(200.0, psnr(sampled.run(None, s), sampled.reference("eager", s), workload.data_range))
        for s in audit
    ]
    print(f"recorded, compiled: {time.perf_counter() - started:.0f} s", flush=True)
    forced = forced_calls(calls)
    search_weights = (recording.steps / recording.hidden.clamp(min=1e-30)).tolist()
    relative = (1 / gram.diagonal()).tolist()
    families: dict[str, list[CacheSchedule]] = {
        "planned": search_schedules(gram, weights=search_weights),
        "planned, history 1": search_schedules(gram, weights=search_weights, history=1),
        "planned, unweighted": search_schedules(gram),
        "planned, only call 0 forced": search_schedules(gram, weights=search_weights, forced=[0]),
        "planned, relative errors": search_schedules(gram, weights=relative),
        "planned, relative errors, only call 0 forced": search_schedules(
            gram, weights=relative, forced=[0]
        ),
        "planned, coherent": planned_coherent(
            gram, [w**0.5 for w in search_weights], forced=forced
        ),
    }
    families["planned, history 3 rows"] = [
        CacheSchedule(calls, s.full, fit_rows(gram, s.full, history=3)) for s in families["planned"]
    ]
    measured: list[float] = []
    if arguments.polish:
        measured = measured_weights(sampled, recording, profile_seeds[:2])
        families["planned, measured weights"] = search_schedules(gram, weights=measured)
        families["planned, measured weights, only call 0 forced"] = search_schedules(
            gram, weights=measured, forced=[0]
        )
        families["planned, measured weights, coherent"] = planned_coherent(
            gram, [w**0.5 for w in measured], forced=forced
        )
    rows: list[dict[str, Any]] = []
    result = {
        "model": "examples/tiny_video",
        "dtype": arguments.dtype,
        "backend": f"ditopt ({arguments.backend})",
        "calls": calls,
        "seeds": {"profile": profile_seeds, "tune": list(TUNE_SEEDS), "audit": audit},
        "noise_floor_db": {"mean": statistics.fmean(compiled), "min": min(compiled)},
        "forced_calls": forced,
        "weights": {"search": search_weights, "measured": measured},
        "schedules": rows,
    }
    budgets = [k for k in arguments.budgets if len(forced) <= k < calls]
    for budget in budgets:
        options = dict(baselines(recording, budget))
        for name, family in families.items():
            options[name] = next((s for s in family if len(s.full) == budget), None)
        for name in ("First-Block Cache", "SmoothCache"):
            known = options[name]
            if known is not None:  # what the fitted rows alone are worth
                rows_only = fit_rows(gram, known.full, history=2)
                options[f"planned rows at {name}'s calls"] = replace(known, rows=rows_only)
        if arguments.polish:
            starts = [
                s
                for name, s in options.items()
                if s is not None and name.startswith("planned") and "history" not in name
            ]
            options["planned, polished"] = polish(
                sampled, gram, starts, [0], list(TUNE_SEEDS), arguments.polish
            )
        for name, schedule in options.items():
            reason = "cannot skip so much" if schedule is None else refused(schedule)
            if schedule is None or reason is not None:
                rows.append({"method": name, "budget": budget, "full": None, "reason": reason})
                continue
            values = sampled.psnrs(schedule, audit)
            rows.append(
                {
                    "method": name,
                    "budget": budget,
                    "full": schedule.full,
                    "psnr_db": [round(value, 2) for value in values],
                    "mean_db": round(statistics.fmean(values), 2),
                    "min_db": round(min(values), 2),
                    "predicted": schedule.error,
                    "gain": max((sum(map(abs, r)) for r in schedule.rows.values()), default=0.0),
                }
            )
        print(f"K = {budget}: {time.perf_counter() - started:.0f} s", flush=True)
        result["claims"] = claims(rows)
        publish(result)
    result["same_by_plan"] = same_by_plan(sampled, recording, families["planned"], audit[0])
    result["rollouts"] = sampled.rollouts
    result["seconds"] = round(time.perf_counter() - started, 1)
    publish(result)
    print(quality_table(result), flush=True)


def _small(workload: Any, steps: int = 20) -> Any:
    """The trained model on 32 tokens, for a dry run."""
    from tiny_video.sampler import conditions_of, denoise, guided_conditions, load_checkpoint

    _, conditions = load_checkpoint()

    def sample(model: Callable[..., Any], seed: int) -> Tensor:
        tokens = guided_conditions(conditions, *conditions_of(seed))
        return denoise(model, tokens, seed, steps, shape=(3, 2, 16, 16))

    return replace(workload, sample=sample)


def same_by_plan(
    sampled: Sampled, recording: Recording, family: Sequence[CacheSchedule], seed: int
) -> dict[str, Any]:
    """One schedule the user's way, by a plan: PSNR to the exchanged schedule's result."""
    schedule = next(s for s in family if 3 < len(s.full) < s.calls)
    plan = plan_with(
        recording.sampler, schedule, model=recording.model, hardware=recording.hardware
    )
    from ditopt import torch_backend

    compiled = sampled.program.backend_name == "inductor"
    backend = torch_backend.ditopt if compiled else torch_backend.ditopt_eager
    model = torch.compile(sampled.workload.model, backend=backend, options={"plan": plan})
    with ditopt.session(calls=recording.sampler.calls):
        ours = sampled.workload.run(seed, {"model": model})
    exchanged = sampled.run(schedule, seed)
    return {
        "full": schedule.full,
        "equal": bool(torch.equal(ours, exchanged)),
        "psnr_db": min(200.0, psnr(ours, exchanged, sampled.workload.data_range)),
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Method -> number of full calls that really ran -> mean PSNR."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["full"] is not None:
            curve = found.setdefault(row["method"], {})
            k = len(row["full"])
            curve[k] = max(curve.get(k, -math.inf), row["mean_db"])
    return found


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each planner and K: the best baseline with at most K full calls, and what it takes.

    `fewer`: whether the planner reaches that baseline's PSNR with fewer full calls than it.
    """
    table = curves(rows)
    rivals = {name: curve for name, curve in table.items() if not name.startswith("planned")}
    found = []
    for name in (name for name in table if name.startswith("planned")):
        for k, value in sorted(table[name].items()):
            best, rival, used = max(
                (v, other, n) for other, curve in rivals.items() for n, v in curve.items() if n <= k
            )
            fewest = fewest_for(table[name], best)
            found.append(
                {
                    "method": name,
                    "full_calls": k,
                    "psnr_db": value,
                    "best_baseline": rival,
                    "its_psnr_db": best,
                    "its_full_calls": used,
                    "lead_db": round(value - best, 2),
                    "needs_for_its_psnr": fewest,
                    "fewer": fewest is not None and fewest < used,
                }
            )
    return found


def quality_table(result: Mapping[str, Any]) -> str:
    budgets = sorted({row["budget"] for row in result["schedules"]})
    lines = [
        f"{result['model']}, {result['dtype']}: mean PSNR over {len(result['seeds']['audit'])} "
        f"seeds; torch.compile noise floor {result['noise_floor_db']['mean']:.1f} dB",
        f"| method | {' | '.join(f'K={k}' for k in budgets)} |",
        "|---|" + "---|" * len(budgets),
    ]
    for name in dict.fromkeys(row["method"] for row in result["schedules"]):
        cells = []
        for k in budgets:
            row = next(r for r in result["schedules"] if (r["method"], r["budget"]) == (name, k))
            less = "" if row["full"] is None or len(row["full"]) == k else f" ({len(row['full'])})"
            cells.append("-" if row["full"] is None else f"{row['mean_db']:.2f}{less}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in dict.fromkeys(c["method"] for c in result["claims"]):
        leads = [c for c in result["claims"] if c["method"] == name]
        cells = " ".join(
            f"{c['full_calls']}:{c['lead_db']:+.2f}{'' if c['fewer'] else '!'}" for c in leads
        )
        lines.append(f"lead of {name}: {cells}   (! = no fewer full calls at its PSNR)")
    if "same_by_plan" in result:
        lines.append(f"by plan: {result['same_by_plan']}; {result['rollouts']} rollouts")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- speed


class Loop:
    """A sampler's loop around one published shape: x moves a little along the model's output."""

    def __init__(self, name: str, inputs: Mapping[str, Any], calls: int) -> None:
        self.inputs = dict(inputs)
        step = self.inputs["timestep"]
        if step.is_floating_point():
            values = [1.0 - k / calls for k in range(calls)]
        else:
            values = [999 - k * 980 // max(1, calls - 1) for k in range(calls)]
        self.timesteps = [torch.full_like(step, value) for value in values]
        self.sampler = Sampler(
            calls=calls,
            timestep="timestep",
            timesteps=tuple(float(t.flatten()[0]) for t in self.timesteps),
            varying=("hidden_states", "timestep"),
        )

    @property
    def calls(self) -> int:
        return len(self.timesteps)

    def __call__(
        self,
        model: Callable[..., Any],
        *,
        session: bool = True,
        after: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        x = self.inputs["hidden_states"]
        named = ditopt.session(calls=self.calls) if session else contextlib.nullcontext()
        with named:
            for call, step in enumerate(self.timesteps):
                out = model(**{**self.inputs, "hidden_states": x, "timestep": step})[0]
                x = x - 0.01 * out[:, : x.shape[1]]
                after(call)
        return x


def relative_l2(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def gate(program: Exchangeable, loop: Loop, eager: Tensor, limit: float) -> dict[str, Any]:
    """Full calls against eager PyTorch; skip calls against the full call of the same inputs.

    With the inputs of the stored calls every forecast whose row sums to 1 is exact.
    """
    schedule = CacheSchedule(3, (0, 1), {2: (1.5, -0.5)})
    program.use(schedule, timesteps=False)
    with ditopt.session(calls=3):
        outs = [program.model(**loop.inputs)[0] for _ in range(3)]
    errors = [relative_l2(outs[1], eager), relative_l2(outs[2], outs[1])]
    found = {
        "full_to_eager": errors[0],
        "skip_to_full": errors[1],
        "limit": limit,
        "counted": program.counters,
        "ok": program.counters == (2, 1) and all(error <= limit for error in errors),
    }
    print(f"  gate: {found}", flush=True)
    return found


def step_times(program: Exchangeable, loop: Loop, **options: Any) -> dict[str, float]:
    """Milliseconds of a full and of a skip call: waited for one by one, and in a row."""
    full = Spread.of([timed(lambda: program.model(**loop.inputs))[1] for _ in range(5)][1:])
    full_row_ms = min(timed(lambda: loop(program.model))[1] for _ in range(2)) / loop.calls
    schedule = spread_pairs(loop.calls, 2)
    program.use(schedule, **options)
    single: list[float] = []
    row_ms = []
    for repeat in range(3):
        clock = [0.0]

        def note(call: int, clock: list[float] = clock, wait: bool = repeat == 0) -> None:
            if call == 1 or wait or call == loop.calls - 1:
                synchronize()
                now = time.perf_counter()
                if wait and call > 2:
                    single.append((now - clock[0]) * 1e3)
                elif call == loop.calls - 1:
                    row_ms.append((now - clock[0]) * 1e3 / (loop.calls - 2))
                clock[0] = now

        loop(program.model, after=note)
    return {
        "full_ms": full.median_ms,
        "full_iqr_ms": full.iqr_ms,
        "full_in_a_row_ms": full_row_ms,
        "skip_waited_ms": statistics.median(single),
        "skip_in_a_row_ms": row_ms[-1],
        "share_waited": statistics.median(single) / full.median_ms,
        "share": row_ms[-1] / full_row_ms,
    }


def skip_kernels(program: Exchangeable, loop: Loop) -> dict[str, Any]:
    """The GPU kernels of one skip call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    program.use(spread_pairs(loop.calls, 2))
    with ditopt.session(calls=loop.calls):
        for step in loop.timesteps[:4]:
            program.model(**{**loop.inputs, "timestep": step})
        synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            program.model(**{**loop.inputs, "timestep": loop.timesteps[4]})
            synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(events, key=lambda event: -event.device_time_total)[:12]
    return {
        "count": len(events),
        "ms": sum(event.device_time_total for event in events) / 1e3,
        "longest": [[e.name[:90], round(e.device_time_total / 1e3, 4)] for e in longest],
    }


def memory(program: Exchangeable, loop: Loop, schedule: CacheSchedule) -> dict[str, Any]:
    """Bytes of stored residuals, predicted and measured against the same loop in full."""
    steps: StepSchedule = schedule.to_steps()
    held: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for label, choice in (("full", None), ("planned", schedule)):
        program.use(choice)
        loop(program.model)
        gc.collect()
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, most = torch.cuda.memory_allocated(), [0]

        def note(_: int, start: int = start, most: list[int] = most) -> None:
            most[0] = max(most[0], torch.cuda.memory_allocated() - start)

        loop(program.model, after=note)
        held[label], peaks[label] = most[0], torch.cuda.max_memory_allocated() - start
    predicted = cache_bytes(steps, program.outputs)
    extra = held["planned"] - held["full"]
    return {
        "full_calls": len(schedule.full),
        "outputs": [[list(shape), str(dtype)] for shape, dtype in program.outputs],
        "predicted_bytes": predicted,
        "measured_bytes": extra,
        "ratio": extra / predicted,
        "peak_difference_bytes": peaks["planned"] - peaks["full"],
    }


def speed(
    name: str, device: torch.device, arguments: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    from shapes import SHAPES, build

    calls = arguments.calls or (12 if name == "wan" else 24)
    model, inputs = build(name, device, tiny=arguments.tiny)
    loop = Loop(name, inputs, calls)
    result: dict[str, Any] = {"model": name, "title": SHAPES[name].title, "calls": calls}
    eager = model(**inputs)[0]
    inductor: Callable[..., Any] | None = None
    limit = 0.04  # bf16: twice what torch.compile has been from eager on these shapes
    if name in arguments.inductor:
        inductor = torch.compile(model)
        out, first_ms = timed(lambda: inductor(**inputs)[0])
        distance = relative_l2(out, eager)
        limit = 2 * distance
        result |= {"inductor_first_call_s": first_ms / 1e3, "inductor_to_eager": distance}
    program = Exchangeable(
        model, plan_with(loop.sampler, spread_pairs(calls, 2)), arguments.backend, check=False
    )
    result["first_call_s"] = timed(lambda: program.model(**inputs))[1] / 1e3
    print(f"{name}: compiled {result['first_call_s']:.1f} s, {result}", flush=True)
    result["gate"] = gate(program, loop, eager, limit)
    if not result["gate"]["ok"]:
        return result
    program.note_outputs()
    program.use(None)
    loop(program.model)
    fused = torch.compile(forecast, dynamic=False)
    result["steps"] = step_times(program, loop)
    program.use(None)
    result["steps_compiled_forecast"] = step_times(program, loop, forecast=fused)
    share = result["steps"]["share"]
    if device.type == "cuda":
        result["skip_kernels"] = skip_kernels(program, loop)
    target = calls_for_speedup(PUBLISHED[name], calls, share)
    wanted = [round(calls * s) for s in (1 / 2, 1 / 3, 1 / 4)]
    result["published"] = {
        "speedup": PUBLISHED[name],
        "full_calls": {str(t): calls_for_speedup(PUBLISHED[name], t, share) for t in (20, 28, 50)}
        | {str(calls): target},
    }
    budgets = sorted({*wanted, *([target] if target >= 2 else [])}, reverse=True)
    schedules = {k: spread_pairs(calls, k) for k in budgets}
    if device.type == "cuda":
        result["memory"] = [memory(program, loop, schedules[k]) for k in wanted]

    runs: dict[str, tuple[CacheSchedule | None, dict[str, Any], bool]] = {
        "full": (None, {}, True),
        **{f"K={k}": (schedules[k], {}, True) for k in budgets},
        f"K={wanted[1]}, no session": (schedules[wanted[1]], {}, False),
        f"K={wanted[2]}, compiled forecast": (schedules[wanted[2]], {"forecast": fused}, True),
    }
    samples: dict[str, list[float]] = {label: [] for label in runs}
    if inductor is not None:
        samples["inductor"] = []
    order, shuffler, rounds = list(samples), random.Random(0), 0
    started = time.perf_counter()
    while rounds < arguments.rounds:
        shuffler.shuffle(order)
        for label in order:
            if label == "inductor":
                samples[label].append(timed(lambda: loop(inductor, session=False))[1])
                continue
            schedule, options, session = runs[label]
            program.use(schedule, **options)
            samples[label].append(
                timed(lambda session=session: loop(program.model, session=session))[1]
            )
            if schedule is not None:
                expected = (len(schedule.full), calls - len(schedule.full))
                assert program.counters == expected, (label, program.counters)
        rounds += 1
        spent = (time.perf_counter() - started) / rounds
        if rounds >= 2 and (
            time.perf_counter() - started + spent > arguments.seconds
            or time.perf_counter() + spent > deadline
        ):
            break
    result["rounds"] = rounds
    result["loops"] = [
        _loop_row(label, samples, runs.get(label, (None, {}, False))[0], share, calls)
        for label in samples
    ]
    print(speed_table([result]), flush=True)
    return result


def _loop_row(
    label: str,
    samples: Mapping[str, list[float]],
    schedule: CacheSchedule | None,
    share: float,
    calls: int,
) -> dict[str, Any]:
    spread = Spread.of(samples[label])
    row: dict[str, Any] = {"loop": label, "ms": spread.median_ms, "iqr_ms": spread.iqr_ms}

    def over(base: str) -> float:
        return statistics.median(a / b for a, b in zip(samples[base], samples[label], strict=True))

    row["speedup_over_full"] = over("full")
    if "inductor" in samples:
        row["speedup_over_inductor"] = over("inductor")
    if schedule is not None:
        k = len(schedule.full)
        row |= {"full_calls": k, "bound": bound(calls, k, share)}
        row["share_of_bound"] = row["speedup_over_full"] / row["bound"]
    return row


def speed_table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| model | loop | ms | IQR | x full | bound | of bound | x inductor |"]
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
                f"| {row.get('speedup_over_inductor', math.nan):.3f} |"
            )
        steps, fused = result["steps"], result["steps_compiled_forecast"]
        lines.append(
            f"{result['model']}: full {steps['full_in_a_row_ms']:.2f} ms (waited for: "
            f"{steps['full_ms']:.2f}); skip "
            f"{steps['skip_in_a_row_ms']:.3f} ms = {steps['share']:.2%} "
            f"(waited for: {steps['skip_waited_ms']:.3f}); compiled forecast "
            f" {fused['skip_in_a_row_ms']:.3f} ms (waited for: "
            f"{fused['skip_waited_ms']:.3f}); {result['published']}"
        )
        if "skip_kernels" in result:
            kernels = result["skip_kernels"]
            lines.append(f"  skip: {kernels['count']} kernels, {kernels['ms']:.3f} ms")
            lines += [f"    {ms} {kernel}" for kernel, ms in kernels["longest"][:8]]
        for one in result.get("memory", ()):
            lines.append(f"  memory: {json.dumps(one)}")
    return "\n".join(lines)


def warm(name: str, device: torch.device, arguments: argparse.Namespace) -> None:
    """Fill the compiler's cache, in a process beside one that measures no times."""
    from shapes import build

    model, inputs = build(name, device, tiny=arguments.tiny)
    loop = Loop(name, inputs, 12 if name == "wan" else 24)
    plan = plan_with(loop.sampler, spread_pairs(loop.calls, 2))
    program = Exchangeable(model, plan, arguments.backend, check=False)
    _, ms = timed(lambda: program.model(**inputs))
    print(f"warm {name}: ditopt {ms / 1e3:.0f} s", flush=True)
    if name in arguments.inductor:
        _, ms = timed(lambda: torch.compile(model)(**inputs))
        print(f"warm {name}: inductor {ms / 1e3:.0f} s", flush=True)


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Results of several processes of one run as one file."""
    parts = [json.loads(path.read_text()) for path in paths]
    merged: dict[str, Any] = {"environment": parts[0]["environment"], "quality": [], "speed": []}
    for part in parts:
        merged["quality"] += part.get("quality", [])
        merged["speed"] += part.get("speed", [])
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["quality", "speed", "warm", "merge"])
    parser.add_argument("files", nargs="*", type=Path, help="what to merge")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=0, help="calls of the trained model's loop")
    parser.add_argument("--seeds", type=int, default=4, help="profile seeds; twice as many audits")
    parser.add_argument("--budgets", nargs="*", type=int, default=list(BUDGETS))
    parser.add_argument("--polish", type=int, default=0, help="rollouts to polish each schedule")
    parser.add_argument("--models", nargs="*", default=["dit-xl", "flux", "wan"])
    parser.add_argument("--inductor", nargs="*", default=["dit-xl", "flux", "wan"])
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, for a dry run")
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the loops of one model")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds for the process")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.deadline

    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"environment": {**describe_environment(device), "date": DATE}}

    def save() -> None:
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")

    if arguments.part == "merge":
        results = merge(arguments.files)
        save()
        return
    with torch.no_grad():
        if arguments.part == "quality":

            def publish(result: dict[str, Any]) -> None:
                results["quality"] = [result]
                save()

            quality(arguments, device, publish)
            return
        for name in arguments.models:
            if arguments.part == "warm":
                warm(name, device, arguments)
            else:
                results.setdefault("speed", []).append(speed(name, device, arguments, deadline))
                save()
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
