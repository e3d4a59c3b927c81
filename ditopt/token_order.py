"""Orders of grid tokens: which token stands where, so that blocks of neighbours are compact.

A permutation is an int64 array over the grid's tokens: the token at place p of the order is the one
at raster position ``permutation[p]``. Text keeps its place; `sequence_permutation` adds it.
Attention does not change when queries, keys and values are permuted alike, so an order is exact: it
only decides which tokens share a block (attention.md, Appendix A1).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, assert_never

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout

Ints = npt.NDArray[np.int64]
_Count = Annotated[int, Field(ge=1, le=1 << 20)]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Raster(_Order):
    """Frame, then row, then column (frame-major): the order in which models lay out tokens."""

    kind: Literal["raster"] = "raster"


class TokenMajor(_Order):
    """All frames of a place, then the next place (temporal heads; Sparse VideoGen, 2502.01776)."""

    kind: Literal["token_major"] = "token_major"


class Tile(_Order):
    """3D tiles, each in raster order inside; tiles at the far ends are cut (STA, 2502.04507).

    Attributes:
        frames, rows, cols: size of a tile in tokens along each axis.
    """

    kind: Literal["tile"] = "tile"
    frames: _Count = 1
    rows: _Count
    cols: _Count


class Morton(_Order):
    """Z-order: the bits of the coordinates interleaved (LLSA's quadrants, 2512.16615).

    Attributes:
        across_frames: interleave the frame number too; else frame after frame, which suits latent
            frames that are unequal steps of time.
    """

    kind: Literal["morton"] = "morton"
    across_frames: bool = True


class Hilbert(_Order):
    """Hilbert's curve through the enclosing power-of-two cube; `across_frames` as for `Morton`."""

    kind: Literal["hilbert"] = "hilbert"
    across_frames: bool = True


TokenOrder = Annotated[Raster | TokenMajor | Tile | Morton | Hilbert, Field(discriminator="kind")]
"""An order of the grid's tokens; discriminated by `kind`, frozen and hashable."""


@lru_cache(maxsize=64)
def permutation(order: TokenOrder, layout: TokenLayout) -> Ints:
    """Raster positions of the grid's tokens, in the order's sequence, [F * H * W]; no text."""
    frames, height, width = layout.frames, layout.height, layout.width
    t, h, w = (axis.ravel() for axis in np.indices((frames, height, width), dtype=np.int64))
    match order:
        case Raster():
            return np.arange(layout.tokens, dtype=np.int64)
        case TokenMajor():
            return np.lexsort((t, w, h))
        case Tile():
            tile = (t // order.frames, h // order.rows, w // order.cols)
            # The last key is the first criterion; the sort is stable: raster inside a tile.
            return np.lexsort(tile[::-1])
        case Morton() | Hilbert():
            # One frame has no third axis to interleave: Hilbert's curve would jump.
            axes = (t, h, w) if order.across_frames and frames > 1 else (h, w)
            code = _interleave(axes) if isinstance(order, Morton) else _hilbert(axes)
            return np.lexsort((code,) if len(axes) == 3 else (code, t))
    assert_never(order)


def inverse(order: Ints) -> Ints:
    """The place of each raster position: ``x[perm][inverse(perm)]`` is x."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order), dtype=np.int64)
    return places


def sequence_permutation(order: TokenOrder, layout: TokenLayout) -> Ints:
    """The permutation of a whole sequence ``text | grid | text``, [layout.total]."""
    whole = np.arange(layout.total, dtype=np.int64)
    grid = slice(layout.text_before, layout.text_before + layout.tokens)
    whole[grid] = permutation(order, layout) + layout.text_before
    return whole


def tile_lengths(order: Tile, layout: TokenLayout) -> Ints:
    """Tokens of each 3D tile in order, [tiles]; below the full size at the far ends of the grid."""
    axes = (
        (layout.frames, order.frames),
        (layout.height, order.rows),
        (layout.width, order.cols),
    )
    extents = [
        np.minimum(size, length - np.arange(0, length, size, dtype=np.int64))
        for length, size in axes
    ]
    lengths = extents[0][:, None, None] * extents[1][None, :, None] * extents[2][None, None, :]
    return np.asarray(lengths.ravel(), dtype=np.int64)


def _bits(axes: tuple[Ints, ...]) -> int:
    return max(1, *(int(axis.max()).bit_length() for axis in axes))


def _interleave(axes: tuple[Ints, ...], bits: int | None = None) -> Ints:
    """The bits of all axes as one number, the highest of the first axis first."""
    code = np.zeros_like(axes[0])
    for bit in reversed(range(bits or _bits(axes))):
        for axis in axes:
            code = (code << 1) | ((axis >> bit) & 1)
    return code


def _hilbert(axes: tuple[Ints, ...]) -> Ints:
    """Distance along Hilbert's curve; J. Skilling, Programming the Hilbert curve (2004)."""
    x = [axis.copy() for axis in axes]
    bits = _bits(axes)
    for level in reversed(range(1, bits)):
        bit, low = 1 << level, (1 << level) - 1
        for axis in range(len(x)):
            is_set = (x[axis] & bit) != 0
            swapped = np.where(is_set, 0, (x[0] ^ x[axis]) & low)
            x[0] = np.where(is_set, x[0] ^ low, x[0] ^ swapped)
            if axis:
                x[axis] ^= swapped
    for axis in range(1, len(x)):
        x[axis] ^= x[axis - 1]
    flips = np.zeros_like(x[0])
    for level in reversed(range(1, bits)):
        flips ^= np.where((x[-1] & (1 << level)) != 0, (1 << level) - 1, 0)
    return _interleave(tuple(axis ^ flips for axis in x), bits)
