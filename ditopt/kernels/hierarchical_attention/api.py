"""The public function: checks its arguments by name and calls the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators)
from .reference import levels


def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int = 8,
    block: int = 16,
    depth: int | None = None,
    coarse: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention to the blocks that a search from coarse to fine keeps; see `reference`.

    Args:
        q: queries [B, H, N, D], any strides.
        k: keys of the same sequence and dtype.
        v: values, the same.
        top_k: blocks that are kept at each level.
        block: tokens of a block, and pooled tokens of a pooled one.
        depth: levels; ``ceil(log_block(N / 256))`` by default.
        coarse: whether pooled tokens stand for what is not kept.
        scale: of the scores; D ** -0.5 by default.

    Returns:
        [B, H, N, D] in q's dtype.

    Raises:
        ValueError: starts with the argument's name.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[2] == 0:
            raise ValueError(
                f"{name}: must be [batch, head, token, channel] with tokens, got {list(x.shape)}"
            )
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: must have q's shape, dtype and device, got {list(x.shape)} of {x.dtype} "
                f"on {x.device}"
            )
    if block < 2:
        raise ValueError(f"block: must be at least 2, got {block}")
    if not 1 <= top_k <= block:
        raise ValueError(f"top_k: must lie in [1, {block}], the block's size, got {top_k}")
    depth = levels(q.shape[2], block) if depth is None else depth
    if depth < 1:
        raise ValueError(f"depth: must be positive, got {depth}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale: must be finite, got {scale}")
    out: Tensor = torch.ops.ditopt.hierarchical_attention.default(
        q, k, v, block, top_k, depth, coarse, scale
    )
    return out
