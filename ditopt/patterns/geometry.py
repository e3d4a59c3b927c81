"""Which blocks of the grid a pattern touches, exactly and without an N x N map.

A block of consecutive tokens is an interval of raster positions. Whether two intervals hold a kept
pair follows in closed form for the patterns that depend on positions or unit numbers
(attention.md, Appendix A2). Patterns that depend on several coordinates cut a block into segments
of one row (window, circle, periodic) or one frame (radial), where the answer is closed as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.patterns.kinds import (
        Band,
        Circle,
        FrameTile,
        MultiDiagonal,
        Periodic,
        Radial,
        Stripe,
        Unit,
        Window,
    )

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
    return any_of(kept, q.starts, k.starts)


def circle(pattern: Circle, layout: TokenLayout, queries: Intervals, keys: Intervals) -> Bools:
    """Blocks [QB, KB] with a pair inside the disk."""
    q, k = _Segments.of(queries, layout), _Segments.of(keys, layout)
    frame_start, frame_stop = _clamped(q.frame, pattern.frames, layout.frames)
    rows = q.row[:, None] - k.row[None, :]
    cols = Intervals(q.first, q.last).gap(Intervals(k.first, k.last))
    kept = (
        (frame_start[:, None] <= k.frame)
        & (k.frame < frame_stop[:, None])
        & (rows * rows + cols * cols < pattern.radius**2)
    )
    return any_of(kept, q.starts, k.starts)


def frame_tile(
    pattern: FrameTile, layout: TokenLayout, queries: Intervals, keys: Intervals
) -> Bools:
    """Blocks [QB, KB] that share a frame, or whose keys touch a reference frame."""
    size = layout.height * layout.width
    q, k = queries.units(size), keys.units(size)
    count = min(pattern.references, layout.frames)
    references = np.arange(count, dtype=np.int64) * layout.frames // count
    touches = np.searchsorted(references, k.first) < np.searchsorted(references, k.last, "right")
    return np.asarray(touches[None, :] | (q.gap(k) == 0), dtype=np.bool_)


def periodic(pattern: Periodic, layout: TokenLayout, queries: Intervals, keys: Intervals) -> Bools:
    """Blocks [QB, KB] with a pair on the stripes of frames and on those of rows."""
    q, k = _Segments.of(queries, layout), _Segments.of(keys, layout)
    frames = np.abs(np.abs(q.frame[:, None] - k.frame) - pattern.frame_offset)
    rows = np.abs(np.abs(q.row[:, None] - k.row) - pattern.row_offset)
    kept = (frames % pattern.frame_period < pattern.frame_width) & (
        rows % pattern.row_period < pattern.row_width
    )
    return any_of(kept, q.starts, k.starts)


def radial(pattern: Radial, layout: TokenLayout, queries: Intervals, keys: Intervals) -> Bools:
    """Blocks [QB, KB] with a pair on the bands, or with keys of the first frame."""
    size = layout.height * layout.width
    q, k = (_Segments.cut(x, size) for x in (queries, keys))
    apart = np.abs(q.unit[:, None] - k.unit)
    width = pattern.decay * size / np.exp2(np.floor(np.log2(np.maximum(apart, 1))))
    gap = Intervals(q.first, q.last).gap(Intervals(k.first, k.last))
    every = np.ceil(1 / width).astype(np.int64)
    kept = np.where(width >= 1, gap + 1 <= width, (gap == 0) & (apart % every == 0))
    return any_of(kept | (apart <= 1) | (k.unit == 0), q.starts, k.starts)


def any_of(pairs: Bools, query_starts: Ints, key_starts: Ints) -> Bools:
    """Whether groups of rows and columns hold a True; a group ends where the next starts."""
    by_query = np.logical_or.reduceat(pairs, query_starts, axis=0)
    return np.asarray(np.logical_or.reduceat(by_query, key_starts, axis=1), dtype=np.bool_)


def _clamped(position: Ints, size: int, length: int) -> tuple[Ints, Ints]:
    """Half-open window ``[start, stop)`` of each position along an axis."""
    size = min(size, length)
    start = np.clip(position - size // 2, 0, length - size)
    return start, start + size


@dataclass(frozen=True)
class _Segments:
    """Blocks cut at the units (rows or frames) that they cross, [S] each, in order.

    `unit` counts through all frames; `first` and `last` are places inside the unit; `starts`
    [blocks] is each block's first segment.
    """

    unit: Ints
    first: Ints
    last: Ints
    starts: Ints
    rows: int = 1

    @classmethod
    def of(cls, blocks: Intervals, layout: TokenLayout) -> _Segments:
        """Cut at the grid's rows."""
        return cls.cut(blocks, layout.width, layout.height)

    @classmethod
    def cut(cls, blocks: Intervals, size: int, rows: int = 1) -> _Segments:
        """Cut at units of `size` tokens, `rows` of which are a frame."""
        units = blocks.units(size)
        counts = units.last - units.first + 1
        starts = np.cumsum(counts) - counts
        block = np.repeat(np.arange(len(counts)), counts)
        unit = units.first[block] + np.arange(counts.sum()) - starts[block]
        first = np.maximum(blocks.first[block] - unit * size, 0)
        last = np.minimum(blocks.last[block] - unit * size, size - 1)
        return cls(unit, first, last, starts, rows)

    @property
    def frame(self) -> Ints:
        return self.unit // self.rows

    @property
    def row(self) -> Ints:
        return self.unit % self.rows
