"""One alternative per site and one option per head: a multiple-choice problem.

Minimal time within bounds on error and memory, or minimal error within bounds on time and memory,
with a bounded number of different block programs. All quantities are linear in the choices.
`lagrangian` gives a solution at any size; `exact` (HiGHS) closes the gap where the problem is small
enough.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ditopt.search.sensitivity import families, program_count

if TYPE_CHECKING:
    from ditopt.search.sensitivity import Choice, Column, Family, Site

Objective = Literal["ms", "error"]

MAX_VARIABLES = 20_000
"""Beyond, the Lagrangian solution is used: its gap is at most about one head's choice."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Assignment:
    """A choice for every site.

    Attributes:
        choices: by site id; sites that stay as they are are left out.
        ms, error, bytes: of all sites together.
    """

    choices: dict[str, Choice]
    ms: float
    error: float
    bytes: int

    def __getitem__(self, quantity: Objective) -> float:
        return self.ms if quantity == "ms" else self.error


@dataclass(frozen=True)
class Limits:
    """What an assignment must stay within.

    Attributes:
        ms, error, bytes: of all sites together.
        programs: number of different block programs; None: any number.
    """

    ms: float = math.inf
    error: float = math.inf
    bytes: float = math.inf
    programs: int | None = None

    def allow(self, kinds: Mapping[str, Family], found: Assignment) -> bool:
        """Whether an assignment keeps them, up to the rounding of sums."""
        within = (
            found.ms <= self.ms * (1 + _ROUNDING)
            and found.error <= self.error * (1 + _ROUNDING)
            and found.bytes <= self.bytes
        )
        most = self.most_programs(kinds)
        return within and (most is None or program_count(kinds, found.choices) <= most)

    def most_programs(self, kinds: Mapping[str, Family]) -> int | None:
        """The bound, or one program for each kind of block where that is more."""
        return None if self.programs is None else max(self.programs, len(kinds))


def evaluate(sites: Sequence[Site], choices: Mapping[str, Choice]) -> Assignment:
    """Time, error and bytes of given choices; other sites stay as they are."""
    ms = error = 0.0
    size = 0
    kept = {}
    for site in sites:
        choice = choices.get(site.id, site.as_is)
        more_ms, more_error, more_bytes = site.cost(choice)
        ms, error, size = ms + more_ms, error + more_error, size + more_bytes
        if choice[0]:
            kept[site.id] = choice
    return Assignment(kept, ms, error, size)


def solve(
    sites: Sequence[Site], minimize: Objective, limits: Limits, *, close_gap: bool = True
) -> Assignment | None:
    """The best assignment within limits, or None where none is found.

    Args:
        sites: what there is to choose.
        minimize: `ms` or `error`; the other one should be limited.
        limits: kept to the rounding of sums.
        close_gap: whether small problems are solved exactly.
    """
    from ditopt.search import exact, lagrangian

    kinds = families(sites)
    if not sites:
        nothing = evaluate(sites, {})
        return nothing if limits.allow(kinds, nothing) else None
    found = lagrangian.solve(sites, kinds, minimize, limits)
    if not close_gap or exact.variables(sites, MAX_VARIABLES) > MAX_VARIABLES:
        return found.best
    best = exact.solve(sites, minimize, limits)
    if best is not None and not limits.allow(kinds, best):
        best = exact.solve_bounded(sites, kinds, minimize, limits, found.columns)
    allowed = [p for p in (best, found.best) if p is not None and limits.allow(kinds, p)]
    return min(allowed, key=lambda point: point[minimize], default=None)


@dataclass
class Found:
    """What the Lagrangian search found.

    Attributes:
        best: the assignment, or None.
        columns: by family, how often alternatives of a block were the best at some multiplier.
    """

    best: Assignment | None = None
    columns: dict[str, Counter[Column]] = field(default_factory=dict)
