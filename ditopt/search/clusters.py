"""Which alternatives blocks share, so that there are few block programs.

Values add up over the sites of a block and over blocks, so the best alternatives for several blocks
together are the best at each site of the summed values: Lloyd's algorithm, exact in each half-step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ditopt.search.sensitivity import Column, Family, Floats

_STEPS = 6

Chosen = dict[str, "list[Column]"]
"""For each family the alternatives of each block."""


def clustered(
    kinds: Mapping[str, Family], values: Mapping[str, Floats], most: int | None
) -> Chosen:
    """The alternatives of least value; at most so many programs in all.

    Args:
        kinds: families of blocks.
        values: [A] of each site's alternatives.
        most: bound, at least the number of families; None: every block for itself.
    """
    tables = {
        name: [
            np.stack([values[block[k].id] for block in family.blocks])
            for k in range(len(family.blocks[0]))
        ]
        for name, family in kinds.items()
    }
    free = {
        name: [_as_column(row) for row in np.stack([t.argmin(axis=1) for t in some], axis=1)]
        for name, some in tables.items()
    }
    if most is None or sum(len(kinds[name].programs(free[name])) for name in kinds) <= most:
        return free
    best: dict[int, tuple[float, Chosen]] = {0: (0.0, {})}
    for name, family in kinds.items():
        by_count = _by_count(family, tables[name], most - len(kinds) + 1)
        merged: dict[int, tuple[float, Chosen]] = {}
        for used, (value, chosen) in best.items():
            for count, (more, columns) in by_count.items():
                total = used + count
                if total <= most and (total not in merged or value + more < merged[total][0]):
                    merged[total] = (value + more, {**chosen, name: columns})
        best = merged
    return min(best.values(), key=lambda item: item[0])[1]


def _by_count(
    family: Family, tables: Sequence[Floats], most: int
) -> dict[int, tuple[float, list[Column]]]:
    """Number of programs -> the least value and the alternatives of each block."""
    sites = family.blocks[0]
    last = max(site.first_call for site in sites)
    # Where sites that choose from an early call on agree in all blocks, an early phase needs one
    # program; where the late ones stay as they are, all phases are alike.
    early = {
        k: int(tables[k].sum(axis=0).argmin())
        for k, site in enumerate(sites)
        if site.first_call < last
    }
    late = dict.fromkeys(range(len(sites)), 0) | early
    found: dict[int, tuple[float, list[Column]]] = {}
    for given in ({}, early, late):
        for count in range(1, most + 1):
            columns = _lloyd(tables, count, given)
            programs = len(family.programs(set(columns)))
            value = sum(
                float(table[b, column[k]])
                for b, column in enumerate(columns)
                for k, table in enumerate(tables)
            )
            if programs <= most and (programs not in found or value < found[programs][0]):
                found[programs] = (value, columns)
            if len(set(columns)) < count:
                break
    return found


def _lloyd(tables: Sequence[Floats], count: int, given: Mapping[int, int]) -> list[Column]:
    """Alternatives of each block, of at most so many kinds; some sites' are given for all."""
    blocks = len(tables[0])

    def centre(members: Sequence[int]) -> Column:
        return tuple(
            given[k] if k in given else int(table[members].sum(axis=0).argmin())
            for k, table in enumerate(tables)
        )

    def cost(column: Column) -> Floats:
        picked = [t[:, number] for t, number in zip(tables, column, strict=True)]
        total: Floats = np.sum(picked, axis=0)
        return total

    centres = [centre(range(blocks))]
    if count > 1:
        picks = np.stack([t.argmin(axis=1) for t in tables], axis=1)
        own = np.stack([t.min(axis=1) for t in tables], axis=1)
        for k, number in given.items():
            picks[:, k], own[:, k] = number, tables[k][:, number]
        while len(centres) < count:
            regret = np.min([cost(c) for c in centres], axis=0) - own.sum(axis=1)
            worst = int(regret.argmax())
            if regret[worst] <= 0:
                break
            centres.append(_as_column(picks[worst]))
    for _ in range(_STEPS if len(centres) > 1 else 0):
        label = np.argmin([cost(c) for c in centres], axis=0)
        moved = [
            centre(np.flatnonzero(label == c).tolist()) if (label == c).any() else centres[c]
            for c in range(len(centres))
        ]
        if moved == centres:
            break
        centres = moved
    label = np.argmin([cost(c) for c in centres], axis=0)
    return [centres[int(c)] for c in label]


def _as_column(row: Sequence[int]) -> Column:
    return tuple(int(number) for number in row)
