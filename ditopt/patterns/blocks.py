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
from ditopt.patterns.kinds import Band, Dense, HeadPattern, MultiDiagonal, Skip, Stripe, Window

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout


def block_mask(
    pattern: HeadPattern,
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
) -> Tensor:
    """The blocks that a pattern keeps, bool [ceil(n_q / block_q), ceil(n_k / block_k)], on the CPU.

    Args:
        pattern: what the head keeps.
        layout: token grid; its text length is adapted to `n_q`. None serves `dense` and `skip`.
        n_q: query tokens, text included.
        n_k: key tokens, text included; equal to `n_q` for a pattern with geometry.
        block_q: query tokens of a block; the last block may be partial.
        block_k: key tokens of a block.

    Raises:
        ValueError: a pattern with geometry without a layout, or one that the sizes contradict.
    """
    with _real_tensors():
        return torch.from_numpy(_mask(pattern, layout, n_q, n_k, block_q, block_k).copy())


def density(
    pattern: HeadPattern,
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
) -> float:
    """Kept fraction of blocks, 0 to 1; arguments as for `block_mask`."""
    return float(_mask(pattern, layout, n_q, n_k, block_q, block_k).mean())


def block_lists(
    patterns: Sequence[HeadPattern],
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """The kept key blocks of each head and query block; one pattern per head.

    Lists have full width whatever the patterns, so equal shapes share one compiled program. The
    tensors are cached: treat them as read-only.

    Returns:
        ``kv_num_blocks`` int32 [1, H, QB] and ``kv_indices`` int32 [1, H, QB, KB] with
        KB = ceil(n_k / block_k): ids ascend, entries past the count are 0.
    """
    return _lists(tuple(patterns), layout, n_q, n_k, block_q, block_k, torch.device(device))


@lru_cache(maxsize=512)
def _lists(
    patterns: tuple[HeadPattern, ...],
    layout: TokenLayout | None,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    masks = np.stack([_mask(p, layout, n_q, n_k, block_q, block_k) for p in patterns])
    counts = masks.sum(axis=-1, dtype=np.int32)
    kept_first = np.argsort(~masks, axis=-1, kind="stable").astype(np.int32)
    used = np.arange(masks.shape[-1]) < counts[..., None]
    lists = np.where(used, kept_first, np.int32(0))
    with _real_tensors():
        return (
            torch.from_numpy(counts[None]).to(device),
            torch.from_numpy(lists[None]).to(device),
        )


@contextmanager
def _real_tensors() -> Iterator[None]:
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
    queries = _GridBlocks.of(layout, n_q, block_q)
    keys = _GridBlocks.of(layout, n_k, block_k)
    mask = np.zeros(shape, dtype=np.bool_)
    mask[queries.has_grid[:, None] & keys.has_grid[None, :]] = _grid_mask(
        pattern, layout, queries.intervals, keys.intervals
    ).ravel()
    return mask | queries.has_text[:, None] | keys.has_text[None, :]


@dataclass(frozen=True)
class _GridBlocks:
    """The blocks of a sequence: which hold text, which hold grid tokens, and which tokens."""

    has_text: Bools
    has_grid: Bools
    intervals: Intervals

    @classmethod
    def of(cls, layout: TokenLayout, n: int, block: int) -> _GridBlocks:
        start = np.arange(0, n, block, dtype=np.int64)
        stop = np.minimum(start + block, n)
        grid_stop = layout.text_before + layout.tokens
        first = np.maximum(start, layout.text_before) - layout.text_before
        last = np.minimum(stop, grid_stop) - 1 - layout.text_before
        has_grid = first <= last
        has_text = (start < layout.text_before) | (stop > grid_stop)
        return cls(has_text, has_grid, Intervals(first[has_grid], last[has_grid]))


def _grid_mask(
    pattern: Band | MultiDiagonal | Stripe | Window,
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
    assert_never(pattern)
