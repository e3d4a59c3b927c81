"""A set of patterns worth measuring for one token grid, from dense to skip, and in which orders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ditopt.patterns.blocks import block_mask, density
from ditopt.patterns.kinds import (
    Band,
    Circle,
    Dense,
    FrameTile,
    HeadPattern,
    MultiDiagonal,
    Periodic,
    Radial,
    Skip,
    Stripe,
    Window,
)
from ditopt.token_order import Tile, TokenMajor

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.token_order import TokenOrder

# At 0.9 and above a sparse kernel gains nothing over a dense one.
_DENSEST = 0.9
# An order of tokens costs a pass over them: it has to spare a pattern this share of its blocks.
_SPARED = 0.2
_MOST = 26
_MOST_IN_ORDER = 6


def orders(layout: TokenLayout | None, block: int) -> tuple[TokenOrder | None, ...]:
    """Orders of tokens worth measuring: None (the model's own), then at most two others.

    3D tiles of about one block of tokens make windows compact; for videos, all frames of a place
    together make a place's own line through time compact.

    Args:
        layout: token grid, or None where it is unknown.
        block: key tokens of a block.
    """
    if layout is None:
        return (None,)
    found: list[TokenOrder | None] = [None]
    tile = _tile(layout, block)
    if tile is not None:
        found.append(tile)
    if layout.frames > 1 and layout.frames <= block:
        found.append(TokenMajor())
    return tuple(found)


def _tile(layout: TokenLayout, block: int) -> Tile | None:
    """The tile of one block of tokens that is most cubic and fits the grid best."""
    best: tuple[float, Tile] | None = None
    grid = (layout.frames, layout.height, layout.width)
    powers = [1 << bit for bit in range(block.bit_length())]
    for frames in powers:
        for rows in powers:
            cols = block // (frames * rows)
            sizes = tuple(zip(grid, (frames, rows, cols), strict=True))
            if frames * rows * cols != block or any(size > n for n, size in sizes):
                continue
            covered = math.prod(-(-n // size) * size / n for n, size in sizes)
            # Latent frames are larger steps than rows and columns: a cube is half as long in time.
            sides = (2 * frames, rows, cols) if layout.frames > 1 else (rows, cols)
            score = covered * max(sides) / min(sides)
            if best is None or score < best[0]:
                best = (score, Tile(frames=frames, rows=rows, cols=cols))
    if best is None:
        return None
    tile = best[1]
    # Whole rows of one frame, or whole frames, are raster order.
    raster = tile.cols == layout.width and (tile.frames == 1 or tile.rows == layout.height)
    return None if raster else tile


def candidates(
    layout: TokenLayout | None,
    n_tokens: int,
    block_q: int = 128,
    block_k: int = 128,
    order: TokenOrder | None = None,
) -> tuple[HeadPattern, ...]:
    """Patterns of several kinds and densities for self-attention over `n_tokens` tokens.

    Patterns that round up to the same blocks are listed once, those that keep nearly everything not
    at all. In an order other than the model's own only patterns remain that it spares many blocks.
    Without a layout only the geometry-free ends remain.

    Args:
        layout: token grid, or None where it is unknown.
        n_tokens: length of the sequence, text included.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
        order: of the grid's tokens; None is the model's own.

    Returns:
        In the model's own order `Dense` first, then descending density, `Skip` last; at most 28.
        In another order at most 6, without the two.
    """
    if layout is None:
        return (Dense(), Skip()) if order is None else ()
    sizes = (layout, n_tokens, n_tokens, block_q, block_k)
    distinct: dict[bytes, tuple[float, HeadPattern]] = {}
    for pattern in _proposals(layout):
        kept = density(pattern, *sizes, order)
        worth = (
            kept < _DENSEST if order is None else kept < (1 - _SPARED) * density(pattern, *sizes)
        )
        if worth:
            mask = block_mask(pattern, *sizes, order)
            distinct.setdefault(mask.numpy().tobytes(), (kept, pattern))
    most = _MOST if order is None else _MOST_IN_ORDER
    chosen = _spread(list(distinct.values()), most)
    return (Dense(), *chosen, Skip()) if order is None else chosen


def _spread(found: list[tuple[float, HeadPattern]], most: int) -> tuple[HeadPattern, ...]:
    """At most so many, by descending density: of each kind in turn the earliest proposal."""
    turns: dict[str, int] = {}
    ranked = []
    for place, (kept, pattern) in enumerate(found):
        turn = turns[pattern.kind] = turns.get(pattern.kind, -1) + 1
        ranked.append((turn, place, kept, pattern))
    chosen = sorted(ranked, key=lambda item: item[:2])[:most]
    # Proposals of equal density keep their order.
    return tuple(item[3] for item in sorted(chosen, key=lambda item: (-item[2], item[1])))


def _proposals(layout: TokenLayout) -> Iterator[HeadPattern]:
    """Windows first: of patterns with equal blocks the one named first is kept.

    Of each kind those come first that are to stay where there are too many.
    """
    if layout.frames > 1:
        yield from _video_proposals(layout)
    else:
        yield from _image_proposals(layout)
    for share in (4, 8, 16, 32):
        # A band of half-width w keeps about 2 w of N keys.
        yield Band(window=max(1, layout.tokens // (2 * share)))


def _video_proposals(layout: TokenLayout) -> Iterator[HeadPattern]:
    frames, rows, cols = layout.frames, layout.height, layout.width
    half, quarter = _part(frames, 2), _part(frames, 4)
    yield Window(frames=1, rows=rows, cols=cols)
    yield Window(frames=frames, rows=_part(rows, 4), cols=_part(cols, 4))
    for size in (half, quarter):
        yield Window(frames=size, rows=rows, cols=cols)
        yield Window(frames=size, rows=_part(rows, 2), cols=cols)
    yield Window(frames=half, rows=_part(rows, 4), cols=_part(cols, 4))
    yield Window(frames=frames, rows=_part(rows, 2), cols=cols)
    frame_tokens = rows * cols
    # Where a frame is a multiple of the block, only width 0 does not touch the blocks beside it.
    for width in (0, *(frame_tokens // (2 * share) for share in (4, 16, 64))):
        yield MultiDiagonal(period="frame", width=width)
    for every, reach in ((frames, 0), (2, 0), (4, 0), (3, 0), (4, 1), (frames, 1)):
        yield Stripe(unit="frame", every=every, reach=reach)
    for references in (frames // 4, frames // 2):
        yield FrameTile(references=max(1, references))
    for decay in (1.0, 0.25):
        yield Radial(decay=decay)
    for share in (8, 4):
        yield Circle(radius=max(2, min(rows, cols) // share + 1), frames=frames)
        yield Circle(radius=max(2, min(rows, cols) // share + 1), frames=_part(frames, 2))
    for period in (2, 3, 4):
        yield _lattice(frames=period)
    for share in (2, 4):
        yield _lattice(rows=max(1, rows // share))


def _lattice(frames: int = 1, rows: int = 1) -> Periodic:
    """Every so many frames and rows from the query's own; stripes stand at fixed ones."""
    return Periodic(
        frame_width=1,
        frame_offset=0,
        frame_period=frames,
        row_width=1,
        row_offset=0,
        row_period=rows,
    )


def _image_proposals(layout: TokenLayout) -> Iterator[HeadPattern]:
    rows, cols = layout.height, layout.width
    for share in (2, 4, 8):
        yield Window(frames=1, rows=_part(rows, share), cols=cols)
        yield Window(frames=1, rows=_part(rows, share), cols=_part(cols, share))
    for share in (4, 8):
        yield Circle(radius=max(1, min(rows, cols) // share))
    for share in (4, 8, 16):
        yield MultiDiagonal(period="row", width=max(1, cols // (2 * share)))
    for every in (2, 4, 8):
        yield Stripe(unit="row", every=every, reach=_part(rows, 2 * every) // 2)
    for share in (4, 8):
        yield _lattice(rows=max(1, rows // share))


def _part(length: int, share: int) -> int:
    """About one `share`-th of an axis, at least one, odd so that the window is centred."""
    return length if share == 1 else max(1, length // share) | 1
