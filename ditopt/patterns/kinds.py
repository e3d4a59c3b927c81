"""The pattern kinds: what each keeps, as numbers in grid units or tokens, never in blocks.

Sizes in grid units keep their meaning at another resolution or block size; lists are built from the
shapes at run time. Below, ``q`` and ``k`` are raster positions of grid tokens (text not counted).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Unit = Literal["frame", "row"]
"""A stretch of consecutive grid tokens: ``height * width`` of them (frame) or ``width`` (row)."""

_Count = Annotated[int, Field(ge=1, le=1 << 31)]
_Distance = Annotated[int, Field(ge=0, le=1 << 31)]
_Factor = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]


class _Pattern(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Dense(_Pattern):
    """Every pair."""

    kind: Literal["dense"] = "dense"


class Skip(_Pattern):
    """No pair: the head's output is zero, for text queries as well (Sparse-vDiT, 2506.03065)."""

    kind: Literal["skip"] = "skip"


class Band(_Pattern):
    """Neighbours in raster order: ``|q - k| <= window``, in tokens (Sparse-vDiT's diagonal)."""

    kind: Literal["band"] = "band"
    window: _Distance


class MultiDiagonal(_Pattern):
    """The same place in other frames or rows: ``q - k`` near a multiple of one period.

    Sparse-vDiT's multi-diagonal, Sparse VideoGen's temporal head (2502.01776).

    Attributes:
        period: distance of the diagonals, one frame or one row of tokens.
        width: half-width of each diagonal in tokens.
    """

    kind: Literal["multi_diagonal"] = "multi_diagonal"
    period: Unit
    width: _Distance


class Stripe(_Pattern):
    """Reference keys for all queries, and the neighbourhood: vertical stripes of the attention map.

    Keeps the keys of every `every`-th unit from the first on (the attention sink), and keys at
    most `reach` units away. Efficient-vDiT's frame tiles (2502.06155), Sparse-vDiT's stripes.

    Attributes:
        unit: frames, or rows counted through all frames.
        every: distance of reference units; beyond the number of units, only the first is one.
        reach: neighbouring units kept on each side; 0 keeps the query's own.
    """

    kind: Literal["stripe"] = "stripe"
    unit: Unit
    every: _Count
    reach: _Distance = 0


class Window(_Pattern):
    """A 3D window around each query, moved inwards at the edges so that it is never cut.

    Along an axis of length n and size s the keys are ``start .. start + s - 1`` with ``start =
    clamp(x - s // 2, 0, n - s)``; a size of n or more keeps the whole axis. STA (2502.04507) at
    stride 1, neighborhood attention (NATTEN).

    Attributes:
        frames: window size in frames.
        rows: window size in rows.
        cols: window size in columns.
    """

    kind: Literal["window"] = "window"
    frames: _Count
    rows: _Count
    cols: _Count


class Circle(_Pattern):
    """A disk around each query on the image grid, cut at the edges (CLEAR, 2412.16112).

    Keeps ``rows apart ** 2 + columns apart ** 2 < radius ** 2``, in tokens.

    Attributes:
        radius: of the disk, in tokens; strict, so 1 keeps the query's own place alone.
        frames: window size in frames, moved inwards at the ends as for `Window`.
    """

    kind: Literal["circle"] = "circle"
    radius: _Count
    frames: _Count = 1


class FrameTile(_Pattern):
    """Own frame and some reference frames: Efficient-vDiT's mask ``k:m-k`` (2502.06155).

    Linear in the number of frames m, where `Stripe` with a fixed distance is not.

    Attributes:
        references: k, frames that every query sees, spread evenly: ``floor(i * m / k)``.
    """

    kind: Literal["frame_tile"] = "frame_tile"
    references: _Count


class Radial(_Pattern):
    """Bands that halve whenever the distance in time doubles: O(n log n) (2506.19852).

    At d frames apart, with s tokens per frame and ``w = decay * s / 2 ** floor(log2 d)``: the whole
    frame for d of 0 and 1; ``|place(q) - place(k)| + 1 <= w`` while w >= 1; beyond that the same
    place only, in frames whose d is a multiple of ``ceil(1 / w)``. The first frame is always kept.

    Attributes:
        decay: factor on the width of every band.
    """

    kind: Literal["radial"] = "radial"
    decay: _Factor = 1.0


class Periodic(_Pattern):
    """The six-parameter stripe: window, diagonals, stripes and all in between (PSA, 2609.37001).

    Keeps ``|dt - frame_offset| mod frame_period < frame_width`` and the same of rows, where dt
    is the distance in frames and dr that in rows inside the frame; PSA counts both in tiles.

    Attributes:
        frame_width, frame_offset, frame_period: Tw, To, Ts of the paper, in frames.
        row_width, row_offset, row_period: Sw, So, Ss, in rows.
    """

    kind: Literal["periodic"] = "periodic"
    frame_width: _Count
    frame_offset: _Distance
    frame_period: _Count
    row_width: _Count
    row_offset: _Distance
    row_period: _Count


GridPattern = Band | MultiDiagonal | Stripe | Window | Circle | FrameTile | Radial | Periodic
"""The patterns that need a token grid."""

HeadPattern = Annotated[Dense | Skip | GridPattern, Field(discriminator="kind")]
"""What one attention head keeps; discriminated by `kind`, frozen and hashable."""
