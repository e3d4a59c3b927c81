"""Which calls to run in full: dynamic programming over the two newest full calls.

The error of a forecast depends on the residuals it combines, hence on the last *two* full calls
(DPCache, arXiv 2602.22654, makes the cost path-dependent in the same way; CEM, arXiv 2512.23258,
has a history-free cost). With the Gram matrix this error is exact for the recorded runs, and so is
the minimum over all schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ditopt.caching.cache_schedule import CacheSchedule, call_weights, forced_calls
from ditopt.caching.fit import DEFAULT_GAIN, DEFAULT_RIDGE
from ditopt.errors import PlanError


def search_schedules(
    gram: Tensor,
    *,
    weights: Sequence[float] | None = None,
    forced: Iterable[int] | None = None,
    history: int = 2,
    ridge: float = DEFAULT_RIDGE,
    max_gain: float = DEFAULT_GAIN,
) -> list[CacheSchedule]:
    """The best schedule with fitted rows for every number of full calls.

    Takes O(T^3) memory (1 MB for T = 50) and O(T^3) time for each number of full calls.

    Args:
        gram: [T, T] inner products.
        weights: as for `schedule_error`.
        forced: calls that must be full; `forced_calls(T)` if None. Call 0 always is.
        history: 1 to reuse the newest residual, 2 for fitted rows over the two newest.
        ridge: as for `fit_row`.
        max_gain: as for `fit_row`.

    Returns:
        One schedule for each number of full calls K, ascending from the number of forced calls to
        T. More full calls hardly ever raise the error, but nothing forbids it: a newer history is
        not always a better one.
    """
    calls = gram.shape[0]
    if history not in (1, 2):
        raise PlanError(f"history is {history}, expected 1 or 2")
    must = {0, *(forced_calls(calls) if forced is None else forced)}
    if not must <= set(range(calls)):
        raise PlanError(f"forced calls {sorted(must)} are not all within 0 to {calls - 1}")
    gram = gram.double()
    slope, error = _best_slopes(gram, history=history, ridge=ridge, max_gain=max_gain)
    cost = call_weights(gram, weights) * error
    cost[:, :, sorted(must)] = math.inf
    spans = _span_costs(cost)

    scale = float(call_weights(gram, weights) @ gram.diagonal()) or 1.0
    # best[previous, last]: least cost of all skips before `last`, the k-th full call.
    best = torch.full((calls, calls), math.inf, dtype=torch.float64)
    best[0, 0] = 0.0  # call 0 has no previous full call: itself stands for it
    came_from: list[Tensor] = []
    found: list[CacheSchedule] = []
    for k in range(1, calls + 1):
        total, at = (best + spans[:, :, calls]).flatten().min(0)
        if math.isfinite(float(total)):
            previous, last = divmod(int(at), calls)
            full = _trace(came_from[: k - 1], previous, last)
            rows = _rows(full, calls, slope, history)
            found.append(CacheSchedule(calls, full, rows, float(total) / scale))
        best, previous_of = (best[:, :, None] + spans[:, :, :calls]).min(0)
        came_from.append(previous_of)
    return found


def _best_slopes(
    gram: Tensor, *, history: int, ridge: float, max_gain: float
) -> tuple[Tensor, Tensor]:
    """[previous, last, call] the best a in `(1 + a) R_last - a R_previous`, and its squared error.

    This is `fit_row` for two sources, for all triples at once: along the line of rows that sum to 1
    the objective is a parabola in a, so clamping a to the allowed gain is optimal, too.
    """
    calls = gram.shape[0]
    energy, index = gram.diagonal(), torch.arange(calls, dtype=torch.float64)
    # With D = R_last - R_previous and E = R_call - R_last:
    stale = energy[None, :, None] + energy[None, None, :] - 2 * gram[None]  # |E|^2
    if history == 1:
        return torch.zeros(calls, calls, calls, dtype=torch.float64), stale.expand(calls, -1, -1)
    spread = (energy[:, None] + energy[None, :] - 2 * gram)[:, :, None]  # |D|^2
    along = (  # <E, D>
        gram[None] - gram[:, None, :] - energy[None, :, None] + gram[:, :, None]
    )
    gap = (index[None, :] - index[:, None])[:, :, None]
    line = (index[None, None, :] - index[None, :, None]) / gap.clamp(min=1.0)
    # The row is (1 + a, -a): moving a by d moves the row by sqrt(2) d.
    pull = 2 * ridge * spread
    slope = (along + pull * line) / (spread + pull)
    slope = torch.where(spread > 0, slope, line)  # equal residuals: any row is right
    slope = torch.where(gap > 0, slope.clamp(-(max_gain + 1) / 2, (max_gain - 1) / 2), 0.0)
    error = (stale - 2 * slope * along + slope.square() * spread).clamp(min=0.0)
    return slope, error


def _span_costs(cost: Tensor) -> Tensor:
    """[previous, last, next] cost of the skips strictly between two full calls; next is up to T."""
    calls = cost.shape[0]
    call = torch.arange(calls)
    cost = torch.where(call[None, None, :] > call[None, :, None], cost, 0.0)
    spans = torch.zeros(calls, calls, calls + 1, dtype=torch.float64)
    spans[:, :, 1:] = cost.cumsum(2)  # shifted by one: without the cost of `next` itself
    end = torch.arange(calls + 1)
    return spans.masked_fill(end[None, None, :] <= call[None, :, None], math.inf)


def _trace(came_from: Sequence[Tensor], previous: int, last: int) -> tuple[int, ...]:
    full = [last]
    for table in reversed(came_from):
        full.append(previous)
        previous, last = int(table[previous, last]), previous
    return tuple(reversed(full))


def _rows(
    full: Sequence[int], calls: int, slope: Tensor, history: int
) -> dict[int, tuple[float, ...]]:
    rows: dict[int, tuple[float, ...]] = {}
    for call in sorted(set(range(calls)) - set(full)):
        stored = [source for source in reversed(full) if source < call][:history]
        if len(stored) == 2:
            a = float(slope[stored[1], stored[0], call])
            rows[call] = (1.0 + a, -a)
        else:
            rows[call] = (1.0,)
    return rows
