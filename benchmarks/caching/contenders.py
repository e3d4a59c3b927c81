"""Who takes part in the comparison of quality, and how each gets its best settings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from batch import CLIP, Shape, sample_together
from published import (
    MODULES,
    SHARES,
    ModularCache,
    ModuleRecorder,
    OnlineFirstBlockCache,
    OnlineTeaCache,
    Stack,
    in_place_of_blocks,
)
from torch import Tensor, nn

import ditopt
from ditopt.caching import CacheSchedule, choose_by_sampling, draw_calls, smoothcache
from ditopt.errors import PlanError
from ditopt.metrics import psnr
from ditopt.plan import Phase, Plan
from ditopt.recipes import Recipe
from ditopt.search.exchange import ExchangeableModel, cache_section

if TYPE_CHECKING:
    from recording import Recording

_EXACT_DB = 200.0


class Sampled:
    """Samples schedules with the real sampler and remembers what it has measured."""

    def __init__(
        self, workload: Any, recording: Recording, backend: str, shape: Shape = CLIP
    ) -> None:
        self.workload, self.calls, self.shape = workload, recording.calls, shape
        every_second = CacheSchedule(
            self.calls,
            tuple(range(0, self.calls, 2)),
            dict.fromkeys(range(1, self.calls, 2), (1.0,)),
        )
        plan = Plan(
            model=recording.model,
            sampler=recording.sampler,
            hardware=recording.hardware,
            phases=(Phase(calls=(0, self.calls)),),
            cache=cache_section(every_second),
        )
        self.program = ExchangeableModel(workload.model, plan, backend)
        self._known: dict[Any, float] = {}
        self._dense: dict[int, Tensor] = {}
        self.rollouts = 0

    def run(self, schedule: CacheSchedule | None, seed: int) -> Tensor:
        """One sample under a schedule; its full and skipped calls are counted and compared."""
        self.program.use(schedule)
        with ditopt.session(calls=self.calls):
            result: Tensor = self.workload.run(seed, {"model": self.program.model})
        self.rollouts += 1
        full = self.calls if schedule is None else len(schedule.full)
        found = self.program.counted
        assert found == (full, self.calls - full), (found, schedule)
        return result

    def dense(self, seed: int) -> Tensor:
        """The model's own result in eager PyTorch."""
        if seed not in self._dense:
            self._dense[seed] = self.workload.run(seed)
        return self._dense[seed]

    def psnrs(self, schedule: CacheSchedule, seeds: Sequence[int]) -> list[float]:
        rows = tuple(sorted(schedule.rows.items()))
        found = []
        for seed in seeds:
            key = (schedule.full, rows, seed)
            if key not in self._known:
                self._known[key] = self.compare(self.run(schedule, seed), seed)
            found.append(self._known[key])
        return found

    def mean(self, schedule: CacheSchedule, seeds: Sequence[int]) -> float:
        """Mean PSNR, all seeds as one batch: for choosing, not for judging."""
        key = (schedule.full, tuple(sorted(schedule.rows.items())), tuple(seeds))
        if key not in self._known:
            self.program.use(schedule)
            with ditopt.session(calls=self.calls):
                results = sample_together(
                    self.workload.model, seeds, self.program.model, self.shape
                )
            self.rollouts += len(seeds)
            pairs = zip(results, seeds, strict=True)
            self._known[key] = statistics.fmean(self.compare(one, seed) for one, seed in pairs)
        return self._known[key]

    def compare(self, result: Tensor, seed: int) -> float:
        return min(_EXACT_DB, psnr(result, self.dense(seed), self.workload.data_range))


@dataclass(frozen=True)
class Entry:
    """One contender's best with at most `budget` full calls; `tries` schedules were sampled."""

    method: str
    budget: int
    schedule: CacheSchedule
    settings: Any
    tries: int


def recipe_entries(
    name: str, recording: Recording, sampled: Sampled, budgets: Sequence[int], tune: Sequence[int]
) -> Iterator[Entry]:
    """A recipe with the settings that tune seeds find best for each budget."""
    recipe = Recipe.load(name)
    usable = [
        (settings, schedule)
        for settings, schedule in recipe.variants(recording.signals)
        if len(schedule.full) <= max(budgets) and _runs(schedule)
    ]
    for budget in budgets:
        # Fewer calls than two below the budget are never the best use of it.
        within = [pair for pair in usable if budget - 2 <= len(pair[1].full) <= budget]
        if within:
            settings, best = max(within, key=lambda pair: sampled.mean(pair[1], tune))
            yield Entry(recipe.name, budget, best, settings, len(within))


def planned_entries(
    recording: Recording,
    sampled: Sampled,
    budgets: Sequence[int],
    tune: Sequence[int],
    short_list: int,
    moves: int,
    history: int,
) -> Iterator[Entry]:
    """The planner: with the recording alone, by a short list of samples, and with moves."""
    drawn = draw_calls(recording.gram, steps=recording.steps)
    for budget in budgets:
        for name, listed, moved in (
            ("planned, not sampled", 1, 0),
            ("planned, short list", short_list, 0),
            ("planned", short_list, moves),
        ):
            chosen = choose_by_sampling(
                recording.gram,
                drawn[budget],
                partial(sampled.mean, seeds=tune),
                short_list=listed,
                moves=moved,
                history=history,
            )
            yield Entry(name, budget, chosen.schedule, None, len(chosen.sampled))


def _runs(schedule: CacheSchedule) -> bool:
    """Whether the step runtime takes it: forecasts far ahead may amplify too much."""
    try:
        schedule.to_steps()
    except PlanError:
        return False
    return True


Released = tuple[str, Any, Callable[[nn.ModuleList], Stack], float | None]
"""Name, settings, what stands for the blocks, and its full calls (None: counted in each run)."""


def released(recording: Recording, workload: Any, seed: int) -> Iterator[Released]:
    """The caches of `published` over all settings that the recipes try."""
    calls, signals = recording.calls, recording.signals
    for threshold in Recipe.load("first_block_cache").values["threshold"][::3]:
        make = partial(OnlineFirstBlockCache, calls=calls, threshold=threshold)
        yield "First-Block Cache, as released", threshold, make, None
    for degree in (1, 4):
        for threshold in Recipe.load("teacache").values["threshold"][::4]:
            powers = signals.polynomial(degree)
            make = partial(OnlineTeaCache, calls=calls, threshold=threshold, powers=powers)
            yield "TeaCache, as released", (threshold, degree), make, None
    for settings, schedule in Recipe.load("taylorseer").variants(signals):
        by_type = dict.fromkeys(MODULES, frozenset(schedule.full))
        make = partial(ModularCache, full=by_type, order=settings["order"])
        yield "TaylorSeer, as released", settings, make, float(len(schedule.full))
    with in_place_of_blocks(workload.model, ModuleRecorder) as recorder:
        workload.run(seed)
    assert isinstance(recorder, ModuleRecorder)
    changes, seen = recorder.changes(), set()
    for threshold in Recipe.load("smoothcache").values["threshold"]:
        for lookahead in (1, 2, 3, 4, 5, 6, 7):
            full = {
                name: smoothcache(changes[name], threshold, lookahead=lookahead).full
                for name in MODULES
            }
            share = sum(SHARES[name] * len(full[name]) for name in MODULES)
            key = tuple(full.values())
            if key not in seen:
                seen.add(key)
                make = partial(ModularCache, full=full, order=0)
                yield "SmoothCache, as released", (threshold, lookahead), make, share
