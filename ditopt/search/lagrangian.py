"""Assignments along one multiplier, with a bounded number of block programs.

At a price of error in milliseconds each head chooses on its own, and each block its alternatives.
Where blocks may not all differ, those of a kind are clustered (`clusters`). The price is moved
until the limit is met; then heads change one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ditopt.search.assignment import Assignment, Found, Limits, Objective, evaluate
from ditopt.search.clusters import clustered

if TYPE_CHECKING:
    from ditopt.search.sensitivity import Choice, Column, Family, Floats, Site

_STEPS, _FILL_STEPS = 24, 40
"""Of the bisection over prices: with all alternatives, and within given ones."""

_NEAREST = 4
"""Sets of alternatives, those nearest to the limit, whose heads are chosen anew."""

_BYTE_PRICES = 16
_TINY = 1e-30

_MOVES = 20
"""Heads that change after all others, to use up what room is left."""


@dataclass(frozen=True)
class _Point:
    """What a price gives.

    Attributes:
        numbers: site id -> alternative.
        ms, error, bytes: of all sites.
    """

    numbers: dict[str, int]
    ms: float
    error: float
    bytes: float

    def __getitem__(self, quantity: Objective) -> float:
        return self.ms if quantity == "ms" else self.error


def solve(
    sites: Sequence[Site], kinds: Mapping[str, Family], minimize: Objective, limits: Limits
) -> Found:
    """The best assignment that some price gives, its heads improved until the limit is met."""
    found = Found()
    for byte_price in _byte_prices(sites, limits):
        found.best = _along(sites, kinds, minimize, limits, byte_price, found)
        if found.best is not None:  # higher prices of bytes only cost more
            break
    return found


def relaxed(sites: Sequence[Site], prices: Floats) -> tuple[Floats, Floats]:
    """Milliseconds and error [L] of all sites at each price, every site choosing on its own."""
    ms, error = np.zeros(len(prices)), np.zeros(len(prices))
    for site in sites:
        curves = site.curves
        k = np.searchsorted(-curves.prices, -prices).clip(max=len(curves.prices) - 1)
        site_ms, site_error = curves.ms[:, k], curves.error[:, k]
        best = (site_ms + prices * site_error).argmin(axis=0)[None]
        ms += np.take_along_axis(site_ms, best, 0)[0]
        error += np.take_along_axis(site_error, best, 0)[0]
    return ms, error


def _byte_prices(sites: Sequence[Site], limits: Limits) -> list[float]:
    if math.isinf(limits.bytes):
        return [0.0]
    largest = max((a.bytes for s in sites for a in s.alternatives), default=0) or 1
    whole = sum(s.alternatives[0].fixed_ms for s in sites) or 1.0
    return [0.0, *(np.geomspace(1e-4, 1e4, _BYTE_PRICES) * whole / largest)]


def _along(
    sites: Sequence[Site],
    kinds: Mapping[str, Family],
    minimize: Objective,
    limits: Limits,
    byte_price: float,
    found: Found,
) -> Assignment | None:
    """The best over prices of error at one price of a byte."""
    bounded: Objective = "error" if minimize == "ms" else "ms"
    limit = limits.error if minimize == "ms" else limits.ms
    most = limits.most_programs(kinds)
    tried: list[_Point] = []

    def at(price: float) -> _Point:
        point, columns = _priced(sites, kinds, price, byte_price, most)
        for name, some in columns.items():
            found.columns.setdefault(name, Counter()).update(some)
        tried.append(point)
        return point

    def distance(point: _Point) -> float:
        if math.isinf(limit):
            return point[minimize]
        return abs(math.log(max(point[bounded], _TINY) / max(limit, _TINY)))

    high, low = _price_range(sites)
    # Error falls with the price and time rises: one end is the best, the other keeps the limit.
    if at(high)[bounded] <= limit and at(low)[bounded] <= limit:
        low, high = (low, low) if minimize == "ms" else (high, high)
    for _ in range(_STEPS if high > low else 0):
        middle = math.sqrt(high * low)
        inside = at(middle)[bounded] <= limit
        if inside == (minimize == "ms"):
            high = middle
        else:
            low = middle
    candidates = [evaluate(sites, {})]
    for point in sorted(_distinct(tried), key=distance)[:_NEAREST]:
        filled = fill(sites, point.numbers, minimize, limit)
        if filled is not None:
            candidates.append(filled)
    allowed = [p for p in candidates if limits.allow(kinds, p)]
    return min(allowed, key=lambda point: (point[minimize], point[bounded]), default=None)


def fill(
    sites: Sequence[Site], numbers: Mapping[str, int], minimize: Objective, limit: float
) -> Assignment | None:
    """The best options of heads within given alternatives, or None where none keeps the limit.

    Between the prices on both sides of the limit, heads change one by one, best price first.
    """
    bounded: Objective = "error" if minimize == "ms" else "ms"
    high, low = _price_range(sites)

    def at(price: float) -> Assignment:
        choices: dict[str, Choice] = {}
        for site in sites:
            a = site.alternatives[numbers[site.id]]
            options = (a.option_ms + price * a.error).argmin(axis=1)
            choices[site.id] = (numbers[site.id], tuple(int(option) for option in options))
        return evaluate(sites, choices)

    curves = [(site.curves, numbers[site.id]) for site in sites]
    falling = np.stack([c.prices for c, _ in curves])
    sums = np.stack([(c.error if bounded == "error" else c.ms)[number] for c, number in curves])

    def total(price: float) -> float:
        k = (falling > price).sum(axis=1).clip(max=falling.shape[1] - 1)
        return float(np.take_along_axis(sums, k[:, None], 1).sum())

    exact, fast = at(high), at(0.0)
    kept, broken = (exact, fast) if minimize == "ms" else (fast, exact)
    if broken[bounded] <= limit:
        return broken
    if kept[bounded] > limit:
        return None
    for _ in range(_FILL_STEPS):
        middle = math.sqrt(high * low)
        if (total(middle) <= limit) == (minimize == "ms"):
            high = middle
        else:
            low = middle
    inside, outside = (at(high), at(low)) if minimize == "ms" else (at(low), at(high))
    kept = inside if inside[bounded] <= limit else kept
    return _one_by_one(sites, kept, outside, minimize, limit)


def _one_by_one(
    sites: Sequence[Site], kept: Assignment, broken: Assignment, minimize: Objective, limit: float
) -> Assignment:
    """Heads go over from `kept`, which keeps the limit, to `broken`, as far as there is room."""
    bounded: Objective = "error" if minimize == "ms" else "ms"
    moves = []
    for site in sites:
        number, before = kept.choices.get(site.id, site.as_is)
        a, after = site.alternatives[number], broken.choices.get(site.id, site.as_is)[1]
        for head, (old, new) in enumerate(zip(before, after, strict=True)):
            ms = float(a.option_ms[new] - a.option_ms[old])
            error = float(a.error[head, new] - a.error[head, old])
            gain, cost = (-ms, error) if minimize == "ms" else (-error, ms)
            if gain > 0:
                moves.append((cost / gain, site.id, head, new, cost))
    room = limit - kept[bounded]
    options = {site.id: list(kept.choices.get(site.id, site.as_is)[1]) for site in sites}
    for _, site_id, head, new, cost in sorted(moves):
        if cost <= room:
            room -= cost
            options[site_id][head] = new
    numbers = {site.id: kept.choices.get(site.id, site.as_is)[0] for site in sites}
    _use_up(sites, numbers, options, minimize, room)
    return evaluate(sites, {s: (numbers[s], tuple(picked)) for s, picked in options.items()})


def _use_up(
    sites: Sequence[Site],
    numbers: Mapping[str, int],
    options: Mapping[str, list[int]],
    minimize: Objective,
    room: float,
) -> None:
    """Change single heads, the largest gain that there is room for first."""
    for _ in range(_MOVES):
        best = (0.0, "", 0, 0, 0.0)
        for site in sites:
            a, picked = site.alternatives[numbers[site.id]], options[site.id]
            heads = np.arange(len(picked))
            ms = a.option_ms[None] - a.option_ms[picked][:, None]
            error = a.error - a.error[heads, picked][:, None]
            gain, cost = (-ms + 0 * error, error) if minimize == "ms" else (-error, ms + 0 * error)
            allowed = np.where(cost <= room, gain, 0.0)
            place = int(allowed.argmax())
            if allowed.flat[place] > best[0]:
                head, option = divmod(place, allowed.shape[1])
                best = (float(allowed.flat[place]), site.id, head, option, float(cost.flat[place]))
        gained, site_id, head, option, paid = best
        if gained <= 0:
            return
        options[site_id][head] = option
        room -= paid


def _priced(
    sites: Sequence[Site],
    kinds: Mapping[str, Family],
    price: float,
    byte_price: float,
    most: int | None,
) -> tuple[_Point, dict[str, list[Column]]]:
    """The best alternatives at a price of error and of bytes, with bounded programs."""
    costs = {site.id: site.curves.at(price) for site in sites}
    values = {
        site.id: costs[site.id][0] + price * costs[site.id][1] + byte_price * site.curves.bytes
        for site in sites
    }
    columns = clustered(kinds, values, most)
    numbers: dict[str, int] = {}
    for name, some in columns.items():
        for members, column in zip(kinds[name].blocks, some, strict=True):
            numbers.update(zip((site.id for site in members), column, strict=True))
    ms = sum(float(costs[s][0][number]) for s, number in numbers.items())
    error = sum(float(costs[s][1][number]) for s, number in numbers.items())
    size = sum(site.alternatives[numbers[site.id]].bytes for site in sites)
    return _Point(numbers, ms, error, size), columns


def _price_range(sites: Sequence[Site]) -> tuple[float, float]:
    """From prohibitive to free for all sites."""
    ends = [(site.curves.prices[0], site.curves.prices[-1]) for site in sites] or [(1.0, 1.0)]
    return float(max(high for high, _ in ends)), float(min(low for _, low in ends))


def _distinct(points: Iterable[_Point]) -> list[_Point]:
    """Points with different alternatives, each once."""
    found: dict[tuple[tuple[str, int], ...], _Point] = {}
    for point in points:
        found.setdefault(tuple(sorted(point.numbers.items())), point)
    return list(found.values())
