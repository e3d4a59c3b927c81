"""A compiled model whose cache schedule can be exchanged: many schedules, one compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ditopt.config import Options
from ditopt.errors import PlanError
from ditopt.plan import Cache, Plan
from ditopt.runtime import StepRuntime, TrajectoryTracker

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule


class ExchangeableModel:
    """A model compiled once for all schedules of one block stack.

    Programs do not depend on the schedule: it only says which of them run and what is combined.

    Args:
        model: what to compile.
        plan: says what the sampling loop is; any cache schedule in it makes the compiler find the
            block stack, and is in use until `use` is called.
        backend: `inductor` or `eager`.
    """

    def __init__(self, model: nn.Module, plan: Plan, backend: str = "inductor") -> None:
        if plan.cache is None:
            raise PlanError("expected a plan with a cache schedule: it shows what is to be cached")
        self._options, self._backend_name = Options(plan=plan), backend
        self._timesteps = plan.sampler.timesteps or None
        self._branches = plan.sampler.branches
        self._schedule: CacheSchedule | None = None
        self._check_times = True
        self._more: dict[str, Any] = {}
        self._tracker: TrajectoryTracker | None = None
        self.calls = plan.sampler.calls
        self.runtimes: list[StepRuntime] = []  # one for each compiled graph, as other shapes need
        self.model: Callable[..., Any] = torch.compile(model, backend=self._backend)

    def use(
        self, schedule: CacheSchedule | None, *, timesteps: bool = True, **options: Any
    ) -> None:
        """Run this schedule from now on; None runs every call in full.

        Args:
            schedule: of the plan's number of calls.
            timesteps: whether calls are checked against the plan's timesteps.
            options: further arguments of `StepRuntime`.
        """
        self._schedule, self._check_times, self._more = schedule, timesteps, options
        self._tracker = self._new_tracker()
        self.runtimes[:] = [self._made(runtime) for runtime in self.runtimes]

    @property
    def counted(self) -> tuple[int, int]:
        """Full and skipped calls since `use`."""
        counters = [runtime.artifact.counters for runtime in self.runtimes]
        return sum(c.full for c in counters), sum(c.skipped for c in counters)

    def _backend(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from ditopt.torch_backend import compile_graph

        compiled = compile_graph(graph, inputs, self._options, self._backend_name)
        if not isinstance(compiled, StepRuntime):
            raise PlanError("the model could not be captured, so nothing of it can be cached")
        if not compiled.programs.base:
            raise PlanError("no block stack was found in the model, so nothing can be cached")
        number = len(self.runtimes)
        self.runtimes.append(self._made(compiled))
        return lambda *args: self.runtimes[number](*args)

    def _new_tracker(self) -> TrajectoryTracker | None:
        if self._schedule is None or not self._schedule.rows:
            return None
        timesteps = self._timesteps if self._check_times else None
        steps = self._schedule.to_steps(timesteps=timesteps, branches=self._branches)
        return TrajectoryTracker(steps)

    def _made(self, like: StepRuntime) -> StepRuntime:
        schedule = None if self._tracker is None else self._tracker.schedule
        return StepRuntime(like.programs, schedule, self._tracker, **self._more)


def cache_section(schedule: CacheSchedule) -> Cache | None:
    """The schedule as a plan's cache section; None where it skips nothing."""
    if not schedule.rows:
        return None
    # Rounding moves the sum by less than the tolerance of the schema, but not to exactly 1.
    rows = {call: tuple(row) for call, row in schedule.rows.items()}
    return Cache(full=schedule.full, history=max(map(len, rows.values())), coefficients=rows)
