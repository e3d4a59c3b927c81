"""Block sets and attention mass at the resolution of a page, as base64 text."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ditopt.token_order import permutation

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.token_order import TokenOrder

Floats = npt.NDArray[np.float64]


def merged(blocks: Floats, side: int) -> tuple[Floats, Floats]:
    """Neighbours of [..., QB, KB] merged to at most `side` rows and columns.

    Returns:
        Means [..., r, c], and how many columns each of the c stands for: mass adds up over columns,
        so it is the first times the second.
    """
    rows, columns = (np.arange(0, size, -(-size // side)) for size in blocks.shape[-2:])
    total = np.add.reduceat(np.add.reduceat(blocks, rows, axis=-2), columns, axis=-1)
    high, wide = (
        np.diff(np.append(starts, size)).astype(np.float64)
        for starts, size in zip((rows, columns), blocks.shape[-2:], strict=True)
    )
    return total / (high[:, None] * wide), wide


def in_raster(
    blocks: Floats, layout: TokenLayout, order: TokenOrder, block_q: int, block_k: int
) -> Floats:
    """Kept share of token pairs by blocks of the raster, from blocks [QB, KB] of an order."""
    grid = np.arange(layout.total)
    inner = slice(layout.text_before, layout.text_before + layout.tokens)
    grid[inner] = layout.text_before + permutation(order, layout)
    queries, keys = (_shares(grid, size) for size in (block_q, block_k))
    return np.asarray(queries @ blocks @ keys.T)


def _shares(grid: npt.NDArray[np.int64], block: int) -> Floats:
    """[raster blocks, blocks of the order]: which share of a raster block lies in the other."""
    count = -(-len(grid) // block)
    shares = np.zeros((count, count))
    np.add.at(shares, (grid // block, np.arange(len(grid)) // block), 1.0)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def encode(shares: Floats) -> str:
    """Base64 of numbers from 0 to 1 in 255 steps."""
    return base64.b64encode(np.round(255 * shares).astype(np.uint8).tobytes()).decode("ascii")


def unpack(packed: npt.NDArray[np.uint8], rows: int, columns: int) -> npt.NDArray[Any]:
    """0 or 1 [..., rows, columns] from packed sets [..., bytes], the lowest bit first."""
    bits = np.unpackbits(packed, axis=-1, count=rows * columns, bitorder="little")
    return bits.reshape(*packed.shape[:-1], rows, columns)
