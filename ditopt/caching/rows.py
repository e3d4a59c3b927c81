"""Forecast rows that need no data: reuse, Newton extrapolation, TaylorSeer's ladder, FoCa.

A row holds the coefficients of the stored residuals, newest first, for one skip call. All rows sum
to 1, so that a residual which does not change is reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def reuse_row() -> tuple[float, ...]:
    """The newest residual as it is."""
    return (1.0,)


def newton_row(time: float, stored: Sequence[float]) -> tuple[float, ...]:
    """Extrapolation by the polynomial through all stored residuals; exact for uneven gaps.

    One stored residual gives reuse, two the straight line (Taylor order 1).

    Args:
        time: of the skip call, in any unit (call index, timestep).
        stored: times of the stored residuals, newest first, all different.
    """
    return tuple(
        math.prod((time - other) / (own - other) for other in stored if other != own)
        for own in stored
    )


def taylor_row(time: float, stored: Sequence[float], order: int) -> tuple[float, ...]:
    """TaylorSeer's forecast (arXiv 2503.06923): backward differences used as derivatives.

    Orders from 2 on are not exact for polynomials, unlike `newton_row`, but amplify noise less.

    Args:
        time: of the skip call.
        stored: times of *all* full calls so far, newest first: a difference of order i needs i + 1.
        order: highest derivative; lower where there are too few full calls.
    """
    times = list(reversed(stored))[-(order + 1) :]
    # ladder[i] is the i-th difference at the current full call, as weights over `times`.
    ladder: list[list[float]] = []
    for now, own in enumerate(times):
        fresh = [[float(index == now) for index in range(len(times))]]
        for older in ladder[:order]:
            gap = own - times[now - 1]
            fresh.append([(a - b) / gap for a, b in zip(fresh[-1], older, strict=True)])
        ladder = fresh
    ahead = time - times[-1]
    row = [0.0] * len(times)
    for i, difference in enumerate(ladder):
        scale = ahead**i / math.factorial(i)
        row = [c + scale * d for c, d in zip(row, difference, strict=True)]
    return tuple(reversed(row))


def foca_row(time: float, stored: Sequence[float], *, reach: float = 3.0) -> tuple[float, ...]:
    """FoCa's forecast (arXiv 2508.16211), as cache-dit runs it, with normalised slopes.

    Each call goes from the newest residual along the mean of two slopes, one between full calls and
    one between the latest calls, forecasts included; from the fourth call on it is pulled back by
    `reach` / calls. cache-dit takes the difference between two full calls for a slope per call.
    Divided by their distance, as here, both slopes are that of the straight line: it is followed
    for `reach` calls and then held.

    Args:
        time: of the skip call.
        stored: times of the full calls so far, newest first.
        reach: how far ahead the line is followed.
    """
    if len(stored) == 1:
        return reuse_row()
    share = min(time - stored[0], reach) / (stored[0] - stored[1])
    return 1.0 + share, -share
