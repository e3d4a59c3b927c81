"""Which blocks of the grid a pattern touches, exactly and without an N x N map.

A block of consecutive tokens is an interval of raster positions. Whether two intervals hold a kept
pair follows in closed form for the patterns that depend on positions or unit numbers
(attention.md, Appendix A2). The 3D window depends on all coordinates; there a block is cut into row
segments (one frame, one row, an interval of columns), for which the answer is closed as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.patterns.kinds import Band, MultiDiagonal, Stripe, Unit, Window

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Intervals:
    """Inclusive intervals of raster positions, [blocks] each; every interval holds a token."""

    first: Ints
    last: Ints

    def units(self, size: int) -> Intervals:
        """The numbers of the units of `size` tokens that each interval touches."""
        return Intervals(self.first // size, self.last // size)

    def gap(self, other: Intervals) -> Ints:
        """Smallest distance between members of each pair of intervals, [blocks, other blocks]."""
        ahead = other.first[None, :] - self.last[:, None]
        behind = self.first[:, None] - other.last[None, :]
        return np.asarray(np.maximum(0, np.maximum(ahead, behind)))


def _unit_tokens(unit: Unit, layout: TokenLayout) -> int:
    return layout.width if unit == "row" else layout.height * layout.width


def band(pattern: Band, queries: Intervals, keys: Intervals) -> Bools:
    """Blocks [QB, KB] with a pair at distance ``<= window``."""
    return queries.gap(keys) <= pattern.window


def multi_diagonal(
    pattern: MultiDiagonal, layout: TokenLayout, queries: Intervals, keys: Intervals
) -> Bools:
    """Blocks [QB, KB] with a pair whose difference is near a multiple of the period."""
    period = _unit_tokens(pattern.period, layout)
    lowest = queries.first[:, None] - keys.last[None, :]
    highest = queries.last[:, None] - keys.first[None, :]
    # The differences are all integers in [lowest, highest]; of the diagonals that end at or after
    # `lowest` the first decides.
    diagonal = -((pattern.width - lowest) // period) * period
    return diagonal - pattern.width <= highest


def stripe(pattern: Stripe, layout: TokenLayout, queries: Intervals, keys: Intervals) -> Bools:
    """Blocks [QB, KB] with a reference unit among the keys, or units at most `reach` apart."""
    size = _unit_tokens(pattern.unit, layout)
    key_units = keys.units(size)
    next_reference = -(-key_units.first // pattern.every) * pattern.every
    return (next_reference <= key_units.last)[None, :] | (
        queries.units(size).gap(key_units) <= pattern.reach
    )


def window(pattern: Window, layout: TokenLayout, queries: Intervals, keys: Intervals) -> Bools:
    """Blocks [QB, KB] with a pair inside the clamped 3D window; S x S work for S row segments."""
    q, k = _Segments.of(queries, layout), _Segments.of(keys, layout)
    frame_start, frame_stop = _clamped(q.frame, pattern.frames, layout.frames)
    row_start, row_stop = _clamped(q.row, pattern.rows, layout.height)
    # A window's start moves by at most one column per query, so the keys that the columns
    # c0 .. c1 see are one interval: from the start of the first to the stop of the last.
    col_start, _ = _clamped(q.first, pattern.cols, layout.width)
    _, col_stop = _clamped(q.last, pattern.cols, layout.width)
    kept = (
        (frame_start[:, None] <= k.frame)
        & (k.frame < frame_stop[:, None])
        & (row_start[:, None] <= k.row)
        & (k.row < row_stop[:, None])
        & (col_start[:, None] <= k.last)
        & (k.first < col_stop[:, None])
    )
    by_query = np.logical_or.reduceat(kept, q.starts, axis=0)
    return np.asarray(np.logical_or.reduceat(by_query, k.starts, axis=1), dtype=np.bool_)


def _clamped(position: Ints, size: int, length: int) -> tuple[Ints, Ints]:
    """Half-open window ``[start, stop)`` of each position along an axis."""
    size = min(size, length)
    start = np.clip(position - size // 2, 0, length - size)
    return start, start + size


@dataclass(frozen=True)
class _Segments:
    """Row segments of blocks, [S] each, in order; `starts` [blocks] is each block's first one."""

    frame: Ints
    row: Ints
    first: Ints
    last: Ints
    starts: Ints

    @classmethod
    def of(cls, blocks: Intervals, layout: TokenLayout) -> _Segments:
        rows = blocks.units(layout.width)
        counts = rows.last - rows.first + 1
        starts = np.cumsum(counts) - counts
        block = np.repeat(np.arange(len(counts)), counts)
        row = rows.first[block] + np.arange(counts.sum()) - starts[block]
        origin = row * layout.width
        return cls(
            frame=row // layout.height,
            row=row % layout.height,
            first=np.maximum(blocks.first[block] - origin, 0),
            last=np.minimum(blocks.last[block] - origin, layout.width - 1),
            starts=starts,
        )
