"""The operators: schemas, fake implementations, device dispatch.

``ditopt::hierarchical_attention`` and ``ditopt::select_blocks_hierarchical``, whose (counts, ids)
`block_sparse_attention` takes with blocks of `block` tokens. CPU runs `reference`; CUDA runs
`triton` (imported on the first launch) where `reason_to_decline` has none, else `reference`, whose
memory grows with N ** 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

_ATTENTION = "ditopt::hierarchical_attention"
_SELECT = "ditopt::select_blocks_hierarchical"
torch.library.define(
    _ATTENTION,
    "(Tensor q, Tensor k, Tensor v, int block, int top_k, int depth, bool coarse, float scale)"
    " -> Tensor",
)
torch.library.define(
    _SELECT,
    "(Tensor q, Tensor k, int block, int top_k, int depth, float scale) -> (Tensor, Tensor)",
)


def reason_to_decline(q: Tensor, block: int, top_k: int, depth: int) -> str | None:
    """Why the Triton kernels cannot run this call, or None where they can."""
    d = q.shape[3]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float16, bfloat16 and float32, q is {q.dtype}"
    if block != 16:
        return f"takes blocks of 16 tokens, got {block}"
    if top_k not in (1, 2, 4, 8, 16):
        return f"keeps 1, 2, 4, 8 or 16 blocks, got {top_k}"
    if d not in (16, 32, 64, 128):
        return f"takes 16, 32, 64 and 128 channels, got {d}"
    if (pooled := -(-q.shape[2] // block**depth)) > 4 * reference.COARSEST:
        return f"takes {4 * reference.COARSEST} tokens at the coarsest level, got {pooled}"
    return None


def _on_reference(
    q: Tensor, k: Tensor, v: Tensor, block: int, top_k: int, depth: int, coarse: bool, scale: float
) -> Tensor:
    out = reference.attention(q, k, v, block, top_k, depth, coarse, scale)
    return _like(q).copy_(out)


@torch.library.impl(_ATTENTION, "cuda")
def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, block: int, top_k: int, depth: int, coarse: bool, scale: float
) -> Tensor:
    if reason_to_decline(q, block, top_k, depth) is not None:
        return _on_reference(q, k, v, block, top_k, depth, coarse, scale)
    from . import triton  # Triton is imported on the first launch only

    return triton.attention(q, k, v, top_k, depth, coarse, scale)


@torch.library.impl(_SELECT, "cuda")
def _select_cuda(
    q: Tensor, k: Tensor, block: int, top_k: int, depth: int, scale: float
) -> tuple[Tensor, Tensor]:
    if reason_to_decline(q, block, top_k, depth) is not None:
        return reference.select_blocks(q, k, block, top_k, depth, scale)
    from . import triton  # Triton is imported on the first launch only

    levels = (triton.pool_levels(q, depth), triton.pool_levels(k, depth))
    ids = triton.select(*levels, top_k, scale)[0]
    kept = min(top_k, ids.shape[2])
    return torch.full_like(ids[..., 0], kept), ids[..., :kept]


def _like(q: Tensor) -> Tensor:
    """Uninitialised output [B, H, N, D] that lies in memory as [B, N, H, D]."""
    batch, heads, n, d = q.shape
    return q.new_empty(batch, n, heads, d).transpose(1, 2)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, top_k: int, depth: int, coarse: bool, scale: float
) -> Tensor:
    return _like(q)


def _fake_select(
    q: Tensor, k: Tensor, block: int, top_k: int, depth: int, scale: float
) -> tuple[Tensor, Tensor]:
    blocks = (q.shape[2] + block - 1) // block
    shape = (q.shape[0], q.shape[1], blocks)
    kept = min(top_k, blocks)
    return (
        q.new_empty(shape, dtype=torch.int32),
        q.new_empty((*shape, kept), dtype=torch.int32),
    )


torch.library.impl(_ATTENTION, "cpu")(_on_reference)
torch.library.impl(_SELECT, "cpu")(reference.select_blocks)
torch.library.register_fake(_ATTENTION, _fake_attention)
torch.library.register_fake(_SELECT, _fake_select)
