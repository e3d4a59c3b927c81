"""Block-sparse attention in plain PyTorch: the specification of every other implementation.

Shapes: ``q`` [B, H, N_q, D], ``k`` and ``v`` [B, H, N_k, D]; ``kv_num_blocks`` [Bl, Hl, QB] and
``kv_indices`` [Bl, Hl, QB, KB], integer, with Bl in {1, B}, Hl in {1, H} and QB = ceil(N_q /
block_q). Query block i attends to the tokens of the key blocks ``kv_indices[..., i,
:kv_num_blocks[..., i]]``, tokens at or beyond N_k do not exist. Optional, and in any combination:

- ``partial``: a second list, of blocks of which a bit mask says which pairs exist (`lists`);
- ``block_lengths`` [ceil(N_k / block_k)]: only the first so many tokens of a key block exist
  (ragged 3D tiles); what lies behind them is never read;
- ``key_bias`` [1|B, 1|H, N_k]: added to the scores of a key, so that it weighs exp(bias) times;
- ``pooled``: P further tokens with biases, and bits that say which query blocks see which (`lists`,
  `pooling`): with block means this is the substitute for dropped blocks, in the same softmax.

Ids outside the keys or the masks contribute nothing, counts are clamped to the list, a row without
keys gives zeros and a log-sum-exp of -inf. The log-sum-exp is natural.

dtype: float64 inputs are computed in float64, everything else accumulates in float32; the output
has q's dtype. Cost: 4 D FLOPs per kept (query, key) pair, 10 D in `backward`; memory of one query
block's scores (block_q x kept tokens) at a time. Differentiable in q, k, v and the pooled tokens
through ordinary autograd, which `backward` equals without recording anything.
Semantics: attention.md sections 5.1, 5.2, A6 and A9; backward: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lists import Partial, Pooled, unpack_bits


class _Rows(NamedTuple):
    """One query block: its rows, the tokens it sees and, additive, which pairs and biases."""

    at: tuple[int, int, slice]
    keys: Tensor  # token positions [T]
    pooled: Tensor  # pooled positions [P]
    bias: Tensor  # [M or 1, T + P], -inf where a pair does not exist


def _positions(ids: Tensor, block_k: int, n_k: int, lengths: Tensor | None) -> Tensor:
    """Positions [C, block_k] of the blocks ``ids`` [C], -1 where there is no token."""
    place = torch.arange(block_k, device=ids.device)
    exists = (ids >= 0) & (ids * block_k < n_k)
    ids = ids.clamp(0, -(-n_k // block_k) - 1)
    positions = ids.long()[:, None] * block_k + place
    inside = exists[:, None] & (positions < n_k)
    if lengths is not None:
        inside &= place < lengths[ids.long()][:, None]
    return torch.where(inside, positions, -1)


def _query_blocks(
    q: Tensor,
    k: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    partial: Partial | None,
    block_lengths: Tensor | None,
    key_bias: Tensor | None,
    pooled: Pooled | None,
) -> Iterator[_Rows]:
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    bh = batch, heads
    counts = kv_num_blocks.clamp(0, kv_indices.shape[-1]).expand(*bh, -1).tolist()
    lists = kv_indices.long().expand(*bh, -1, -1)
    if partial is not None:
        some = partial.num_blocks.clamp(0, partial.indices.shape[-1]).expand(*bh, -1).tolist()
        some_lists = partial.indices.long().expand(*bh, -1, -1)
        mask_ids = partial.mask_ids.long().expand(*bh, -1, -1)
    none = torch.zeros(0, dtype=torch.long, device=q.device)
    for b in range(batch):
        for h in range(heads):
            for i, start in enumerate(range(0, n_q, block_q)):
                rows = min(block_q, n_q - start)
                keys = _positions(lists[b, h, i, : counts[b][h][i]], block_k, n_k, block_lengths)
                keys = keys[keys >= 0]
                bias = torch.zeros(1, keys.numel(), dtype=accumulate, device=q.device)
                if partial is not None and some[b][h][i] > 0:
                    used = slice(0, some[b][h][i])
                    more = _positions(some_lists[b, h, i, used], block_k, n_k, block_lengths)
                    which = mask_ids[b, h, i, used]
                    known = (which >= 0) & (which < partial.masks.shape[0])
                    bits = unpack_bits(partial.masks[torch.where(known, which, 0)], block_k)
                    seen = (bits & known[:, None, None])[:, :rows].transpose(0, 1)[:, more >= 0]
                    more = more[more >= 0]
                    hidden = seen.new_zeros(seen.shape, dtype=accumulate)
                    hidden.masked_fill_(~seen, float("-inf"))
                    keys = torch.cat([keys, more])
                    bias = torch.cat([bias.expand(rows, -1), hidden], -1)
                if key_bias is not None:
                    bias = bias + key_bias.expand(*bh, -1)[b, h, keys].to(accumulate)
                tokens = none
                if pooled is not None:
                    seen = unpack_bits(pooled.bits.expand(*bh, -1, -1)[b, h, i], pooled.k.shape[2])
                    tokens = seen.nonzero()[:, 0]
                    extra = pooled.bias.expand(*bh, -1)[b, h, tokens].to(accumulate)
                    bias = torch.cat([bias, extra.expand(bias.shape[0], -1)], -1)
                yield _Rows((b, h, slice(start, start + rows)), keys, tokens, bias)


def _gather(x: Tensor, extra: Tensor | None, rows: _Rows, dtype: torch.dtype) -> Tensor:
    """The tokens [T + P, D] that a query block sees."""
    b, h, _ = rows.at
    tokens = x[b, h].index_select(0, rows.keys).to(dtype)
    if extra is None:
        return tokens
    return torch.cat([tokens, extra[b, h].index_select(0, rows.pooled).to(dtype)])


def _softmax(q: Tensor, keys: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights [M, T] and natural log-sum-exp [M]; rows that see nothing are zero and -inf."""
    scores = (q @ keys.T) * scale + bias
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1) - float("inf")
    safe = torch.where(lse == float("-inf"), 0.0, lse)
    return torch.exp(scores - safe[:, None]), lse


def block_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled: Pooled | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N_q, D] in q's dtype, natural-log LSE [B, H, N_q] in the accumulator's."""
    batch, heads, n_q, _ = q.shape
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    lists = (kv_num_blocks, kv_indices, block_q, block_k)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for rows in _query_blocks(q, k, *lists, partial, block_lengths, key_bias, pooled):
        keys = _gather(k, pooled.k if pooled else None, rows, accumulate)
        values = _gather(v, pooled.v if pooled else None, rows, accumulate)
        weights, lse = _softmax(q[rows.at].to(accumulate), keys, rows.bias, scale)
        outs.append(weights @ values)
        lses.append(lse)
    out = torch.cat(outs).view(batch, heads, n_q, v.shape[-1])
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


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of what they belong to; None without pooled tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor | None
    pooled_v: Tensor | None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled: Pooled | None = None,
) -> Gradients:
    """Gradients for those of out [B, H, N_q, D] and lse [B, H, N_q]; biases and bits get none.

    With weights p = exp(score - lse): dv = p^T do, dp = do v^T, ds = p (dp - delta) with delta =
    sum(do out) - dlse, dq = scale ds k and dk = scale ds^T q.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    delta = (grad_out.to(accumulate) * out.to(accumulate)).sum(-1) - grad_lse.to(accumulate)
    inputs = [q, k, v, *((pooled.k, pooled.v) if pooled else ())]
    grads = [torch.zeros_like(x, dtype=accumulate) for x in inputs]
    lists = (kv_num_blocks, kv_indices, block_q, block_k)
    for rows in _query_blocks(q, k, *lists, partial, block_lengths, key_bias, pooled):
        b, h, _ = rows.at
        keys = _gather(k, pooled.k if pooled else None, rows, accumulate)
        values = _gather(v, pooled.v if pooled else None, rows, accumulate)
        queries, upstream = q[rows.at].to(accumulate), grad_out[rows.at].to(accumulate)
        safe = torch.where(lse[rows.at] == float("-inf"), 0.0, lse[rows.at]).to(accumulate)
        weights = torch.exp((queries @ keys.T) * scale + rows.bias - safe[:, None])
        ds = weights * (upstream @ values.T - delta[rows.at][:, None]) * scale
        grads[0][rows.at] = ds @ keys
        dk, dv = ds.T @ queries, weights.T @ upstream
        count = rows.keys.numel()
        grads[1][b, h].index_add_(0, rows.keys, dk[:count])
        grads[2][b, h].index_add_(0, rows.keys, dv[:count])
        if pooled is not None:
            grads[3][b, h].index_add_(0, rows.pooled, dk[count:])
            grads[4][b, h].index_add_(0, rows.pooled, dv[count:])
    dq, dk, dv, *extra = (grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return Gradients(dq, dk, dv, *(extra or (None, None)))
