"""The assignment as a mixed-integer program for HiGHS (SciPy's `milp`).

Binaries z[site, alternative] and w[site, alternative, head, option] with ``sum_option w = z``;
where the number of block programs binds, x[block, column] and y[program] with ``x <= y`` and ``sum
y <= most``. Options that another one of the same head beats in time and in error are left out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from ditopt.search.assignment import Assignment, Limits, Objective, evaluate

if TYPE_CHECKING:
    from ditopt.search.sensitivity import Alternative, Choice, Column, Family, Floats, Program, Site

_MAX_NODES = 2_000
"""A limit on nodes and not on time, so that the same profile always gives the same plan."""

_ALL_COLUMNS = 64
"""Combinations of a block's alternatives that are all offered; of more, those worth a program."""

_GAP = 1e-4
"""Relative gap at which larger programs stop; small ones (`_SMALL` variables) are solved fully."""
_SMALL = 2_000


def variables(sites: Sequence[Site], enough: int) -> int:
    """How many binaries heads need; only a bound where that is far above `enough`."""
    bound = sum(a.error.size for site in sites for a in site.alternatives)
    if bound > 4 * enough:
        return bound
    return sum(
        _kept(a, head).size for s in sites for a in s.alternatives for head in range(s.heads)
    )


def solve(sites: Sequence[Site], minimize: Objective, limits: Limits) -> Assignment | None:
    """The best assignment with any number of programs, or None."""
    return _Program(sites).solve(sites, minimize, limits)


def solve_bounded(
    sites: Sequence[Site],
    kinds: Mapping[str, Family],
    minimize: Objective,
    limits: Limits,
    columns: Mapping[str, Counter[Column]],
) -> Assignment | None:
    """The best assignment with bounded programs, each block's alternatives one of the columns.

    All combinations are columns where there are few, so that the result is exact; else `columns`,
    those found first.
    """
    program = _Program(sites)
    most = limits.most_programs(kinds)
    assert most is not None
    uses: dict[Program, list[int]] = {}
    for name, family in kinds.items():
        ranges = [range(len(site.alternatives)) for site in family.blocks[0]]
        offered = (
            list(itertools.product(*ranges))
            if math.prod(map(len, ranges)) <= _ALL_COLUMNS
            else sorted(c for c, _ in columns[name].most_common(_ALL_COLUMNS))
        )
        for block in family.blocks:
            picks = [program.variable() for _ in offered]
            program.equal(dict.fromkeys(picks, 1.0), 1.0)
            for place, site in enumerate(block):
                for number, z in enumerate(program.switch[site.id]):
                    row = {
                        x: 1.0 for x, c in zip(picks, offered, strict=True) if c[place] == number
                    }
                    program.equal({**row, z: -1.0}, 0.0)
            for x, column in zip(picks, offered, strict=True):
                for needed in family.programs([column]):
                    uses.setdefault(needed, []).append(x)
    made = {needed: program.variable() for needed in uses}
    for needed, users in uses.items():
        for x in users:
            program.at_most({x: 1.0, made[needed]: -1.0}, 0.0)
    program.at_most(dict.fromkeys(made.values(), 1.0), float(most))
    return program.solve(sites, minimize, limits)


@contextlib.contextmanager
def _standard_output_kept() -> Iterator[None]:
    """HiGHS now and then prints a line of its own, which has no place in ``--json -``."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _kept(alternative: Alternative, head: int) -> npt.NDArray[np.int64]:
    """Options of a head that no other one beats, ascending."""
    ms, error = alternative.option_ms, alternative.error[head]
    order = np.lexsort((np.arange(len(ms)), error, ms))
    best = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
    return np.sort(order[error[order] < best])


class _Program:
    """Columns and rows of the integer program."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._count = 0
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._costs: dict[int, tuple[float, float, float]] = {}
        self.switch: dict[str, list[int]] = {}
        self._heads: dict[int, list[tuple[list[int], list[int]]]] = {}
        for site in sites:
            chosen = [self.variable() for _ in site.alternatives]
            self.switch[site.id] = chosen
            self.equal(dict.fromkeys(chosen, 1.0), 1.0)
            for z, a in zip(chosen, site.alternatives, strict=True):
                self._costs[z] = (a.fixed_ms, 0.0, float(a.bytes))
                self._heads[z] = []
                for head in range(site.heads):
                    kept = [int(option) for option in _kept(a, head)]
                    w = [self.variable() for _ in kept]
                    for x, o in zip(w, kept, strict=True):
                        self._costs[x] = (float(a.option_ms[o]), float(a.error[head, o]), 0.0)
                    self.equal({**dict.fromkeys(w, 1.0), z: -1.0}, 0.0)
                    self._heads[z].append((w, kept))

    def variable(self) -> int:
        """A new binary."""
        self._count += 1
        return self._count - 1

    def equal(self, row: dict[int, float], value: float) -> None:
        """Require a sum."""
        self._rows.append((row, value, value))

    def at_most(self, row: dict[int, float], value: float) -> None:
        """Bound a sum."""
        self._rows.append((row, -np.inf, value))

    def solve(
        self, sites: Sequence[Site], minimize: Objective, limits: Limits
    ) -> Assignment | None:
        """What HiGHS finds, or None."""
        costs = np.zeros((self._count, 3))
        for x, cost in self._costs.items():
            costs[x] = cost
        constraints = [self._structure()]
        for column, limit in zip(costs.T, (limits.ms, limits.error, limits.bytes), strict=True):
            if math.isfinite(limit):
                scale = float(np.abs(column).max()) or 1.0
                constraints.append(LinearConstraint(column[None] / scale, -np.inf, limit / scale))
        goal: Floats = costs[:, 0 if minimize == "ms" else 1]
        with _standard_output_kept():
            result = milp(
                goal / (float(np.abs(goal).max()) or 1.0),
                integrality=np.ones(self._count, dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={
                    "node_limit": _MAX_NODES,
                    "mip_rel_gap": 0.0 if self._count <= _SMALL else _GAP,
                },
            )
        return None if result.x is None else evaluate(sites, self._choices(sites, result.x))

    def _structure(self) -> LinearConstraint:
        entries = [(r, x, c) for r, (row, _, _) in enumerate(self._rows) for x, c in row.items()]
        rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
        matrix = sparse.csr_array((values, (rows, columns)), (len(self._rows), self._count))
        lower, upper = (np.array([row[k] for row in self._rows]) for k in (1, 2))
        return LinearConstraint(matrix, lower, upper)

    def _choices(self, sites: Sequence[Site], x: Floats) -> dict[str, Choice]:
        choices: dict[str, Choice] = {}
        for site in sites:
            number = int(np.argmax([x[z] for z in self.switch[site.id]]))
            heads = self._heads[self.switch[site.id][number]]
            choices[site.id] = (number, tuple(kept[int(np.argmax(x[w]))] for w, kept in heads))
        return choices
