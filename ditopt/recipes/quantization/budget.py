"""Bits under a budget, shared out by one metric and spent by each group's own (ViDiT-Q)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Layers of one group in one range of calls: in few bits unless they are raised.

    Attributes:
        role: units of one role are judged by one metric.
        low, high: bits held in either case, times the calls of the range.
        error: squared error that raising takes away, relative to the output, times the calls.
        own: the same in the role's own metric, per call.
    """

    role: str
    low: float
    high: float
    error: float
    own: float


def raised(units: Sequence[Unit], most: float) -> set[int]:
    """Numbers of the units to raise so that all together hold at most `most` bits.

    First without regard to roles, by the error that a bit takes away; that gives each role its
    budget. Then within each role the most sensitive units in its own metric, as long as they fit.
    """
    first = _greedy(units, range(len(units)), most, lambda u: u.error / (u.high - u.low))
    chosen: set[int] = set()
    for role in sorted({unit.role for unit in units}):
        own = [k for k, unit in enumerate(units) if unit.role == role]
        budget = sum(units[k].high if k in first else units[k].low for k in own)
        chosen |= _greedy(units, own, budget, lambda u: u.own)
    return chosen


def _greedy(
    units: Sequence[Unit], among: Sequence[int], most: float, key: Callable[[Unit], float]
) -> set[int]:
    left = most - sum(units[k].low for k in among)
    chosen = set()
    for k in sorted(among, key=lambda k: (-key(units[k]), k)):
        step = units[k].high - units[k].low
        if step <= left * (1 + 1e-12) and key(units[k]) > 0:
            chosen.add(k)
            left -= step
    return chosen
