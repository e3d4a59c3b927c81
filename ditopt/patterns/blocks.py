"""Patterns -> block masks, block lists and density, for a whole sequence with its text tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ditopt.patterns import geometry
from ditopt.patterns.geometry import Bools, Intervals
from ditopt.patterns.kinds import (
    Band,
    Circle,
    Dense,
    FrameTile,
    GridPattern,
    HeadPattern,
    MultiDiagonal,
    Periodic,
    Radial,
    Skip,
    Stripe,
    Window,
)
from ditopt.token_order import permutation

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.token_order import Ints, TokenOrder

_PAIRS = 1 << 24  # pairs of runs that are looked at together: some 100 MB


def block_mask(
    pattern: HeadPattern,
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    order: TokenOrder | None = None,
) -> Tensor:
    """The blocks that a pattern keeps, bool [ceil(n_q / block_q), ceil(n_k / block_k)], on the CPU.

    Args:
        pattern: what the head keeps.
        layout: token grid; its text length is adapted to `n_q`. None serves `dense` and `skip`.
        n_q: query tokens, text included.
        n_k: key tokens, text included; equal to `n_q` for a pattern with geometry.
        block_q: query tokens of a block; the last block may be partial.
        block_k: key tokens of a block.
        order: of the grid's tokens in the sequence; None is raster.

    Raises:
        ValueError: a pattern with geometry without a layout, or one that the sizes contradict.
    """
    with real_tensors():
        return torch.from_numpy(_mask(pattern, layout, n_q, n_k, block_q, block_k, order).copy())


def density(
    pattern: HeadPattern,
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    order: TokenOrder | None = None,
) -> float:
    """Kept fraction of blocks, 0 to 1; arguments as for `block_mask`."""
    return float(_mask(pattern, layout, n_q, n_k, block_q, block_k, order).mean())


def block_lists(
    patterns: Sequence[HeadPattern],
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    device: torch.device | str,
    order: TokenOrder | None = None,
) -> tuple[Tensor, Tensor]:
    """The kept key blocks of each head and query block; one pattern per head.

    Lists have full width whatever the patterns, so equal shapes share one compiled program. The
    tensors are cached: treat them as read-only.

    Returns:
        ``kv_num_blocks`` int32 [1, H, QB] and ``kv_indices`` int32 [1, H, QB, KB] with
        KB = ceil(n_k / block_k): ids ascend, entries past the count are 0.
    """
    where = torch.device(device)
    return _lists(tuple(patterns), layout, n_q, n_k, block_q, block_k, where, order)


@lru_cache(maxsize=512)
def _lists(
    patterns: tuple[HeadPattern, ...],
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    device: torch.device,
    order: TokenOrder | None,
) -> tuple[Tensor, Tensor]:
    masks = np.stack([_mask(p, layout, n_q, n_k, block_q, block_k, order) for p in patterns])
    counts = masks.sum(axis=-1, dtype=np.int32)
    kept_first = np.argsort(~masks, axis=-1, kind="stable").astype(np.int32)
    used = np.arange(masks.shape[-1]) < counts[..., None]
    lists = np.where(used, kept_first, np.int32(0))
    with real_tensors():
        return (
            torch.from_numpy(counts[None]).to(device),
            torch.from_numpy(lists[None]).to(device),
        )


@contextmanager
def real_tensors() -> Iterator[None]:
    """Tensors made inside are ordinary ones, even while a graph is traced or inference mode is on.

    They outlive the call in a cache, and neither a fake nor an inference tensor may.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        yield


@lru_cache(maxsize=4096)
def _mask(
    pattern: HeadPattern,
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    order: TokenOrder | None,
) -> Bools:
    if min(n_q, n_k, block_q, block_k) < 1:
        raise ValueError(f"sizes must be positive, got {n_q=} {n_k=} {block_q=} {block_k=}")
    shape = (-(-n_q // block_q), -(-n_k // block_k))
    if isinstance(pattern, Dense):
        return np.ones(shape, dtype=np.bool_)
    if isinstance(pattern, Skip):
        return np.zeros(shape, dtype=np.bool_)
    if layout is None:
        raise ValueError(f"pattern {pattern.kind!r} needs a token layout, and none is known")
    if n_q != n_k:
        raise ValueError(
            f"pattern {pattern.kind!r} needs queries and keys of one sequence, got {n_q} and {n_k}"
        )
    layout = layout.fit(n_q)
    queries = _GridBlocks.of(layout, n_q, block_q, order)
    keys = _GridBlocks.of(layout, n_k, block_k, order)
    mask = np.zeros(shape, dtype=np.bool_)
    mask[queries.has_grid[:, None] & keys.has_grid[None, :]] = _kept(
        pattern, layout, queries, keys
    ).ravel()
    return mask | queries.has_text[:, None] | keys.has_text[None, :]


@dataclass(frozen=True)
class _GridBlocks:
    """The blocks of a sequence: which hold text, which hold grid tokens, and which tokens.

    `runs` are stretches of the raster, several per block in another order; `starts` is the first
    run of each block that holds grid tokens.
    """

    has_text: Bools
    has_grid: Bools
    runs: Intervals
    starts: Ints

    @classmethod
    def of(cls, layout: TokenLayout, n: int, block: int, order: TokenOrder | None) -> _GridBlocks:
        start = np.arange(0, n, block, dtype=np.int64)
        stop = np.minimum(start + block, n)
        grid_stop = layout.text_before + layout.tokens
        first = np.maximum(start, layout.text_before) - layout.text_before
        last = np.minimum(stop, grid_stop) - 1 - layout.text_before
        has_grid = first <= last
        has_text = (start < layout.text_before) | (stop > grid_stop)
        first, last = first[has_grid], last[has_grid]
        if order is None:
            starts = np.arange(len(first), dtype=np.int64)
            return cls(has_text, has_grid, Intervals(first, last), starts)
        return cls(has_text, has_grid, *_runs(permutation(order, layout), first, last))


def _runs(order: Ints, first: Ints, last: Ints) -> tuple[Intervals, Ints]:
    """The stretches of the raster in each block ``order[first .. last]``; each block's first."""
    block = np.repeat(np.arange(len(first)), last - first + 1)
    tokens = order[np.lexsort((order, block))]
    begins = np.ones(len(tokens), dtype=np.bool_)
    begins[1:] = (np.diff(tokens) != 1) | (np.diff(block) != 0)
    at = np.flatnonzero(begins)
    ends = np.append(at[1:], len(tokens)) - 1
    return Intervals(tokens[at], tokens[ends]), np.searchsorted(block[at], np.arange(len(first)))


def _kept(
    pattern: GridPattern, layout: TokenLayout, queries: _GridBlocks, keys: _GridBlocks
) -> Bools:
    """Blocks with grid tokens that hold a kept pair, a few query blocks at a time."""
    ends = np.append(queries.starts[1:], len(queries.runs.first))
    most = int((ends - queries.starts).max(initial=1)) * len(keys.runs.first)
    step = max(1, _PAIRS // max(1, most))
    parts = [np.zeros((0, len(keys.starts)), dtype=np.bool_)]
    for block in range(0, len(ends), step):
        low, high = queries.starts[block], ends[min(block + step, len(ends)) - 1]
        runs = Intervals(queries.runs.first[low:high], queries.runs.last[low:high])
        pairs = _grid_mask(pattern, layout, runs, keys.runs)
        parts.append(
            geometry.any_of(pairs, queries.starts[block : block + step] - low, keys.starts)
        )
    return np.concatenate(parts)


def _grid_mask(
    pattern: GridPattern,
    layout: TokenLayout,
    queries: Intervals,
    keys: Intervals,
) -> Bools:
    match pattern:
        case Band():
            return geometry.band(pattern, queries, keys)
        case MultiDiagonal():
            return geometry.multi_diagonal(pattern, layout, queries, keys)
        case Stripe():
            return geometry.stripe(pattern, layout, queries, keys)
        case Window():
            return geometry.window(pattern, layout, queries, keys)
        case Circle():
            return geometry.circle(pattern, layout, queries, keys)
        case FrameTile():
            return geometry.frame_tile(pattern, layout, queries, keys)
        case Radial():
            return geometry.radial(pattern, layout, queries, keys)
        case Periodic():
            return geometry.periodic(pattern, layout, queries, keys)
    assert_never(pattern)
