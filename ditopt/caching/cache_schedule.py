"""`CacheSchedule`: full calls and forecast rows, with their error on recorded runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.caching.fit import forecast_error
from ditopt.errors import PlanError
from ditopt.runtime.schedule import StepSchedule


@dataclass(frozen=True)
class CacheSchedule:
    """A proposal for a plan's cache section.

    Attributes:
        calls: T.
        full: full calls, ascending.
        rows: skip call -> coefficients, newest full call first.
        error: `schedule_error` on the recorded runs, or None where no recording was consulted.
    """

    calls: int
    full: tuple[int, ...]
    rows: Mapping[int, tuple[float, ...]]
    error: float | None = None

    def to_steps(
        self, *, timesteps: Sequence[float] | None = None, branches: int = 1
    ) -> StepSchedule:
        """As the step runtime takes it."""
        return StepSchedule.build(
            self.calls, self.full, self.rows, timesteps=timesteps, branches=branches
        )


def schedule_error(
    gram: Tensor, schedule: CacheSchedule, weights: Sequence[float] | None = None
) -> float:
    """Weighted squared error of all forecasts, relative to the weighted squared residuals.

    Open loop: each forecast starts from recorded residuals, not from those of a run with skips.

    Args:
        gram: [T, T] inner products.
        schedule: any schedule, planned or baseline.
        weights: [T] cost of a call's squared error for the result; 1 if None.
    """
    cost = call_weights(gram, weights)
    total = 0.0
    for call, row in schedule.rows.items():
        sources = [source for source in reversed(schedule.full) if source < call][: len(row)]
        total += float(cost[call]) * forecast_error(gram, call, sources, row)
    return total / float(cost @ gram.diagonal())


def call_weights(gram: Tensor, weights: Sequence[float] | None) -> Tensor:
    """[T] the weights in fp64, ones for None."""
    if weights is None:
        return torch.ones(gram.shape[0], dtype=torch.float64)
    result = torch.as_tensor(weights, dtype=torch.float64)
    if result.shape != (gram.shape[0],) or not bool((result >= 0).all()):
        raise PlanError(f"weights must be {gram.shape[0]} numbers, none negative")
    return result


def forced_calls(calls: int, *, last: bool = True) -> tuple[int, ...]:
    """Calls that published caches never skip: the first 10%, at least two, and the last one."""
    first = min(calls, max(2, math.ceil(calls / 10)))
    return tuple(sorted({*range(first), *([calls - 1] if last else [])}))
