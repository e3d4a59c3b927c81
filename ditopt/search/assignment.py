"""One pattern per head: a multiple-choice problem, solved exactly or along its Lagrangian frontier.

Minimal time within an error budget, or minimal error within a time budget; both are linear in the
choices. The frontier (one multiplier, each site on its own) is fast and optimal for the budgets
that it hits, so the search scans it; HiGHS closes the gap at the budget that is asked for at last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

if TYPE_CHECKING:
    from ditopt.search.problem import Floats, SiteOptions

_MULTIPLIERS = 256
_MAX_VARIABLES = 20_000
"""Beyond, the frontier is used: its gap is at most one site's choice, negligible among so many."""

_MAX_NODES = 2_000
"""A limit on nodes and not on time, so that the same profile always gives the same plan."""

Objective = Literal["ms", "error"]


@dataclass(frozen=True)
class Assignment:
    """A choice for every site.

    Attributes:
        options: site id -> option of each head; sites not listed run the dense kernel.
        ms: attention time of one call, all sites together.
        error: sum of the heads' errors.
    """

    options: dict[str, tuple[int, ...]]
    ms: float
    error: float


def frontier(sites: Sequence[SiteOptions]) -> list[Assignment]:
    """Assignments from the most exact to the fastest, each with less time than the one before.

    A multiplier at which several sites change is split into one step per site, the cheapest error
    first, so that equal sites do not leave gaps.
    """
    points = [evaluate(sites, {})]
    for multiplier in _multipliers(sites):
        changes = []
        for site in sites:
            chosen = _best(site, multiplier)
            before = points[-1].options.get(site.id)
            if chosen is not None and chosen != before:
                ms, error = _difference(site, before, chosen)
                changes.append((error / -ms if ms < 0 else math.inf, site.id, chosen, ms, error))
        for price, site_id, chosen, ms, error in sorted(changes):
            if price < math.inf:
                last = points[-1]
                options = {**last.options, site_id: chosen}
                points.append(Assignment(options, last.ms + ms, last.error + error))
    return points


def solve(sites: Sequence[SiteOptions], minimize: Objective, budget: float) -> Assignment | None:
    """The best assignment within a budget on the other quantity, or None where there is none.

    Args:
        sites: what there is to choose.
        minimize: `ms` (then `budget` bounds the error) or `error` (then it bounds the time in ms).
        budget: the bound, kept to relative rounding of the solver.
    """
    bounded: Objective = "error" if minimize == "ms" else "ms"
    near = [point for point in frontier(sites) if getattr(point, bounded) <= budget]
    best = min(near, key=lambda point: float(getattr(point, minimize)), default=None)
    if sum(site.error.size for site in sites) > _MAX_VARIABLES:
        return best
    exact = _solve_exactly(sites, minimize, budget)
    if exact is None or getattr(exact, bounded) > budget:
        return best
    if best is not None and getattr(best, minimize) <= getattr(exact, minimize):
        return best
    return exact


def evaluate(sites: Sequence[SiteOptions], options: dict[str, tuple[int, ...]]) -> Assignment:
    """Time and error of given options."""
    ms = error = 0.0
    for site in sites:
        chosen = options.get(site.id)
        if chosen is None:
            ms += site.dense_ms
            continue
        index = np.array(chosen)
        ms += site.fixed_ms + float(site.option_ms[index].sum())
        error += float(site.error[np.arange(len(index)), index].sum())
    return Assignment(options, ms, error)


def _difference(
    site: SiteOptions, before: tuple[int, ...] | None, after: tuple[int, ...]
) -> tuple[float, float]:
    """What changing one site adds to time and error."""
    old = evaluate([site], {} if before is None else {site.id: before})
    new = evaluate([site], {site.id: after})
    return new.ms - old.ms, new.error - old.error


def _multipliers(sites: Sequence[SiteOptions]) -> Floats:
    """Prices of error in ms, from prohibitive to free."""
    errors = np.concatenate([site.error[site.error > 0].ravel() for site in sites] or [np.ones(1)])
    largest = max([site.dense_ms + site.fixed_ms for site in sites], default=1.0)
    if not errors.size:
        return np.zeros(1)
    high = 1e3 * largest / float(errors.min())
    low = 1e-6 * largest / float(errors.sum())
    return np.append(np.geomspace(high, low, _MULTIPLIERS), 0.0)


def _best(site: SiteOptions, multiplier: float) -> tuple[int, ...] | None:
    """The options that minimise time + multiplier x error; None for the dense kernel."""
    priced = site.option_ms + multiplier * site.error
    chosen = priced.argmin(axis=1)
    total = site.fixed_ms + priced[np.arange(len(chosen)), chosen].sum()
    return tuple(int(option) for option in chosen) if total < site.dense_ms else None


def _solve_exactly(
    sites: Sequence[SiteOptions], minimize: Objective, budget: float
) -> Assignment | None:
    """HiGHS: binaries x[site, head, option] and z[site] (not dense), sum over options x = z."""
    if not sites:
        return Assignment({}, 0.0, 0.0)
    heads = [(s, h) for s, site in enumerate(sites) for h in range(site.error.shape[0])]
    sizes = np.array([sites[s].error.shape[1] for s, _ in heads])
    starts = np.cumsum(sizes) - sizes
    count = int(sizes.sum())
    ms = np.concatenate(
        [sites[s].option_ms for s, _ in heads] + [[s.fixed_ms - s.dense_ms for s in sites]]
    )
    error = np.concatenate([sites[s].error[h] for s, h in heads] + [np.zeros(len(sites))])
    dense_ms = sum(site.dense_ms for site in sites)
    goal, bounded, limit = (
        (ms, error, budget) if minimize == "ms" else (error, ms, budget - dense_ms)
    )
    rows = np.repeat(np.arange(len(heads)), sizes)
    choice = sparse.csr_array((np.ones(count), (rows, np.arange(count))), (len(heads), len(ms)))
    switch_columns = count + np.array([s for s, _ in heads])
    switch = sparse.csr_array(
        (np.ones(len(heads)), (np.arange(len(heads)), switch_columns)), (len(heads), len(ms))
    )
    scale, goal_scale = (float(np.abs(x).max()) or 1.0 for x in (bounded, goal))
    result = milp(
        goal / goal_scale,
        integrality=np.ones(len(ms), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(choice - switch, 0, 0),
            LinearConstraint(bounded[None, :] / scale, -np.inf, limit / scale),
        ],
        options={"node_limit": _MAX_NODES, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    picked: dict[int, list[int]] = {}
    for (s, _), start, size in zip(heads, starts, sizes, strict=True):
        if result.x[count + s] > 0.5:
            picked.setdefault(s, []).append(int(result.x[start : start + size].argmax()))
    return evaluate(sites, {sites[s].id: tuple(options) for s, options in picked.items()})
