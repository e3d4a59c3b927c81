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


HeadPattern = Annotated[
    Dense | Skip | Band | MultiDiagonal | Stripe | Window, Field(discriminator="kind")
]
"""What one attention head keeps; discriminated by `kind`, frozen and hashable."""
