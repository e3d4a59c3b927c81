"""Published step caches as schedules, so that they run and are judged in the same harness.

The adaptive ones decide from values that hardly depend on the prompt; here they decide offline,
from recorded values. Every recipe reuses or forecasts the residual of the whole block stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ditopt.caching.cache_schedule import CacheSchedule
from ditopt.caching.rows import reuse_row, taylor_row
from ditopt.errors import PlanError


def relative_change(gram: Tensor) -> Tensor:
    """[T, T] `||R_t - R_s|| / ||R_s||` at [s, t]: how much call t's residual differs from s's."""
    energy = gram.diagonal()
    squared = (energy[:, None] + energy[None, :] - 2 * gram).clamp(min=0.0)
    return (squared / energy[:, None].clamp(min=torch.finfo(gram.dtype).tiny)).sqrt()


def uniform(calls: int, interval: int, *, first: int = 1, last: bool = True) -> CacheSchedule:
    """Every `interval`-th call in full, reuse between (FORA, arXiv 2407.01425).

    Args:
        calls: T.
        interval: 1 means no skips.
        first: calls at the beginning that are full.
        last: whether the last call is full.
    """
    _check(calls, interval=interval, first=first)
    full = {call for call in range(calls) if call < first or (call - first + 1) % interval == 0}
    return _reusing(calls, full | ({calls - 1} if last else set()))


def evenly_spaced(calls: int, budget: int) -> CacheSchedule:
    """`budget` full calls as evenly as possible, the first one included, reuse between."""
    _check(calls, budget=budget)
    return _reusing(calls, {call * calls // budget for call in range(min(budget, calls))})


def taylorseer(
    calls: int, interval: int, *, order: int = 1, first: int = 3, last: bool = False
) -> CacheSchedule:
    """TaylorSeer (arXiv 2503.06923): every `interval`-th call in full, Taylor forecasts between.

    Args:
        calls: T.
        interval: N; N - 1 skips follow each full call.
        order: highest derivative.
        first: calls at the beginning that are full.
        last: whether the last call is full.
    """
    _check(calls, interval=interval, first=first, order=order)
    full = uniform(calls, interval, first=first, last=last).full
    rows = {}
    for call in sorted(set(range(calls)) - set(full)):
        stored = [float(source) for source in reversed(full) if source < call]
        rows[call] = taylor_row(float(call), stored, order)
    return CacheSchedule(calls, full, rows)


def teacache(
    changes: Sequence[float], threshold: float, *, polynomial: Sequence[float] = (1.0, 0.0)
) -> CacheSchedule:
    """TeaCache (arXiv 2411.19108): skip until the accumulated change of the input is too large.

    Args:
        changes: [T] relative L1 change of the first block's modulated input since the call before;
            entry 0 is ignored.
        threshold: delta.
        polynomial: maps the input's change to the output's, highest power first.
    """
    calls, full, accumulated = len(changes), {0, len(changes) - 1}, 0.0
    _check(calls)
    for call in range(1, calls - 1):
        value = 0.0
        for coefficient in polynomial:
            value = value * changes[call] + coefficient
        accumulated += value
        if not accumulated < threshold:
            full.add(call)
            accumulated = 0.0
    return _reusing(calls, full)


def first_block_cache(changes: Tensor, threshold: float) -> CacheSchedule:
    """First-Block Cache (ParaAttention): skip while the first block's residual hardly changes.

    Args:
        changes: [T, T] relative L1 change of the first block's residual from call s to call t at
            [s, t].
        threshold: at which a call is full, compared with the last full call.
    """
    full = [0]
    for call in range(1, changes.shape[0]):
        if not float(changes[full[-1], call]) < threshold:
            full.append(call)
    return _reusing(changes.shape[0], set(full))


def magcache(
    ratios: Sequence[float], threshold: float, *, max_skips: int = 3, retention: float = 0.2
) -> CacheSchedule:
    """MagCache (arXiv 2506.09045): skip while the product of magnitude ratios stays near 1.

    Args:
        ratios: [T] mean norm of the residual over that of the call before; entry 0 is ignored.
            From a Gram matrix: `sqrt(G[t, t] / G[t-1, t-1])`, a mean over all tokens at once.
        threshold: on the accumulated |1 - product|.
        max_skips: in a row.
        retention: share of calls at the beginning that are full.
    """
    calls, first = len(ratios), max(1, math.ceil(retention * len(ratios)))
    _check(calls, max_skips=max_skips + 1)
    full, product, error, skips = set(range(min(first, calls))), 1.0, 0.0, 0
    for call in range(first, calls):
        product *= ratios[call]
        error += abs(1.0 - product)
        skips += 1
        if not (error <= threshold and skips <= max_skips):
            full.add(call)
            product, error, skips = 1.0, 0.0, 0
    return _reusing(calls, full)


def smoothcache(changes: Tensor, threshold: float, *, lookahead: int = 3) -> CacheSchedule:
    """SmoothCache (arXiv 2411.10510): after each full call skip as far as the error allows.

    Args:
        changes: [T, T] relative change of call t's residual from call s's at [s, t], such as
            `relative_change` gives (the paper takes L1 norms).
        threshold: largest change that is reused.
        lookahead: most skips in a row.
    """
    calls, call, full = changes.shape[0], 0, {changes.shape[0] - 1}
    _check(calls, lookahead=lookahead + 1)
    while call < calls - 1:
        full.add(call)
        reach = [
            ahead
            for ahead in range(1, lookahead + 1)
            if call + ahead < calls - 1 and float(changes[call, call + ahead]) <= threshold
        ]
        call += max(reach, default=0) + 1
    return _reusing(calls, full)


def _reusing(calls: int, full: set[int]) -> CacheSchedule:
    rows = {call: reuse_row() for call in range(calls) if call not in full}
    return CacheSchedule(calls, tuple(sorted(full)), rows)


def _check(calls: int, **at_least_one: int) -> None:
    for name, value in (("calls", calls), *at_least_one.items()):
        if value < 1:
            raise PlanError(f"{name} is {value}, too small for this recipe")
