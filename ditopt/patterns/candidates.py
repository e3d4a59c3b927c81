"""A small set of patterns worth measuring for one token grid, from dense to skip."""

from __future__ import annotations

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
    Radial,
    Skip,
    Stripe,
    Window,
)

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout

# At 0.9 and above a sparse kernel gains nothing over a dense one.
_DENSEST = 0.9


def candidates(
    layout: TokenLayout | None,
    n_tokens: int,
    block_q: int = 128,
    block_k: int = 128,
) -> tuple[HeadPattern, ...]:
    """Patterns of several kinds and densities for self-attention over `n_tokens` tokens.

    Patterns that round up to the same blocks are listed once, those that keep nearly everything not
    at all. Without a layout only the geometry-free ends remain.

    Args:
        layout: token grid, or None where it is unknown.
        n_tokens: length of the sequence, text included.
        block_q: query tokens of a block.
        block_k: key tokens of a block.

    Returns:
        `Dense` first, then descending density, `Skip` last.
    """
    if layout is None:
        return (Dense(), Skip())
    distinct: dict[bytes, tuple[float, HeadPattern]] = {}
    for pattern in _proposals(layout):
        kept = density(pattern, layout, n_tokens, n_tokens, block_q, block_k)
        mask = block_mask(pattern, layout, n_tokens, n_tokens, block_q, block_k)
        if kept < _DENSEST:
            distinct.setdefault(mask.numpy().tobytes(), (kept, pattern))
    # sorted() is stable, so proposals of equal density keep their order.
    sparse = [pattern for _, pattern in sorted(distinct.values(), key=lambda item: -item[0])]
    return (Dense(), *sparse, Skip())


def _proposals(layout: TokenLayout) -> Iterator[HeadPattern]:
    """Windows first: of patterns with equal blocks the one named first is kept."""
    if layout.frames > 1:
        yield from _video_proposals(layout)
    else:
        yield from _image_proposals(layout)
    for share in (4, 8, 16, 32):
        # A band of half-width w keeps about 2 w of N keys.
        yield Band(window=max(1, layout.tokens // (2 * share)))


def _video_proposals(layout: TokenLayout) -> Iterator[HeadPattern]:
    frames, rows, cols = layout.frames, layout.height, layout.width
    for share in (1, 2, 4):
        size = _part(frames, share)
        yield Window(frames=size, rows=rows, cols=cols)
        yield Window(frames=size, rows=_part(rows, 2), cols=cols)
    yield Window(frames=1, rows=rows, cols=cols)
    for share in (1, 2):
        yield Window(frames=_part(frames, share), rows=_part(rows, 4), cols=_part(cols, 4))
    frame_tokens = rows * cols
    for share in (4, 16, 64):
        yield MultiDiagonal(period="frame", width=frame_tokens // (2 * share))
    # Where a frame is a multiple of the block, only this one does not touch the blocks beside it.
    yield MultiDiagonal(period="frame", width=0)
    for every, reach in ((2, 0), (4, 1), (4, 0), (frames, 1), (frames, 0)):
        yield Stripe(unit="frame", every=every, reach=reach)
    yield FrameTile(references=max(1, frames // 4))
    for decay in (1.0, 0.25):
        yield Radial(decay=decay)


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


def _part(length: int, share: int) -> int:
    """About one `share`-th of an axis, at least one, odd so that the window is centred."""
    return length if share == 1 else max(1, length // share) | 1
