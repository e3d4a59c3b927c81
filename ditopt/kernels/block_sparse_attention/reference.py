"""Block-sparse attention in plain PyTorch: the specification of every other implementation.

Shapes: ``q`` [B, H, N_q, D], ``k`` and ``v`` [B, H, N_k, D]; ``kv_num_blocks`` [Bl, Hl, QB] and
``kv_indices`` [Bl, Hl, QB, KB], integer, with Bl in {1, B}, Hl in {1, H} and QB = ceil(N_q /
block_q). Row i of block q attends to the tokens of the key blocks ``kv_indices[..., i,
:kv_num_blocks[..., i]]``; a kept block is kept whole and tokens at or beyond N_k do not exist. Ids
outside the keys contribute nothing, counts are clamped to [0, KB], a row without keys gives zeros
and a log-sum-exp of -inf.

dtype: float64 inputs are computed in float64, everything else accumulates in float32; the output
has q's dtype. Cost: 4 D FLOPs per kept (query, key) pair; memory of one query block's scores
(block_q x kept tokens) at a time. Differentiable in q, k and v through ordinary autograd.
Semantics: attention.md sections 5.1 and 5.2 (FlexAttention's list layout with full blocks only).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _kept_positions(ids: Tensor, block_k: int, n_k: int) -> Tensor:
    """Token positions [T] of the key blocks ``ids`` [C], in list order, cut at ``n_k``."""
    ids = ids[(ids >= 0) & (ids * block_k < n_k)].long()
    positions = (ids[:, None] * block_k + torch.arange(block_k, device=ids.device)).flatten()
    return positions[positions < n_k]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense softmax attention of q [M, D] over k and v [T, D] with T > 0; natural-log LSE [M]."""
    scores = (q @ k.T) * scale
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse[:, None]) @ v, lse


def block_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N_q, D] in q's dtype, natural-log LSE [B, H, N_q] in the accumulator's."""
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    counts = kv_num_blocks.clamp(0, kv_indices.shape[-1]).expand(batch, heads, -1).tolist()
    lists = kv_indices.expand(batch, heads, -1, -1)
    rows: list[Tensor] = []
    lses: list[Tensor] = []
    for b in range(batch):
        for h in range(heads):
            qh, kh, vh = (t[b, h].to(accumulate) for t in (q, k, v))
            for i, start in enumerate(range(0, n_q, block_q)):
                tile = qh[start : start + block_q]
                kept = _kept_positions(lists[b, h, i, : counts[b][h][i]], block_k, n_k)
                if kept.numel() == 0:
                    rows.append(tile.new_zeros(tile.shape[0], v.shape[-1]))
                    lses.append(tile.new_full((tile.shape[0],), float("-inf")))
                    continue
                out, lse = _attend(tile, kh.index_select(0, kept), vh.index_select(0, kept), scale)
                rows.append(out)
                lses.append(lse)
    out = torch.cat(rows).view(batch, heads, n_q, v.shape[-1])
    return out.to(q.dtype), torch.cat(lses).view(batch, heads, n_q)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """Attention output [B, H, N_q, D] in q's dtype; see the module's docstring."""
    out, _ = block_sparse_attention_with_lse(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale
    )
    return out
