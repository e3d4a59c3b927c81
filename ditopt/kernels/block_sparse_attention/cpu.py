"""Block-sparse attention on CPU: gather each query block's keys, then batched dense attention.

Shapes and lists as in `reference`, which this must equal. Query blocks of all heads that keep the
same number of tokens become one call of PyTorch's own CPU flash attention with batch = query
blocks, so the arithmetic runs at dense speed and nothing is multiplied only to be masked. Heads
that keep everything are one dense call without a gather. At most `GATHER_BYTES` of gathered keys
and values exist at a time.

dtype: float32, float64, bfloat16, float16, as PyTorch's attention takes them. Cost: 4 D FLOPs per
kept (query, key) pair plus one copy of the kept keys and values per query block: 1 / block_q of the
arithmetic's operands. Not differentiable and data dependent: it runs inside the operator only.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

GATHER_BYTES = 4 << 20  # fastest of 1, 2, 4, 8 and 32 MiB: the copies stay in the cache


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] as [B * H * ceil(N / block), block, D], the last block filled with zeros."""
    missing = -x.shape[2] % block
    x = pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.view(-1, block, x.shape[-1])


def _sanitize(counts: Tensor, ids: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """How many valid ids there are, and the ids, int64, ascending, padded with `key_blocks`."""
    width = ids.shape[-1]
    used = torch.arange(width) < counts[..., None]
    used &= (ids >= 0) & (ids < key_blocks)
    ids = torch.where(used, ids.long(), key_blocks).sort(-1).values
    return used.sum(-1), ids


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Fills ``out`` [B, H, N_q, D] completely and returns it; arguments as in `reference`."""
    batch, heads, n_q, d = q.shape
    n_k = k.shape[2]
    query_blocks, key_blocks = -(-n_q // block_q), -(-n_k // block_k)
    tail = n_k - (key_blocks - 1) * block_k
    counts, ids = _sanitize(kv_num_blocks, kv_indices, key_blocks)
    ragged = (ids == key_blocks - 1).any(-1) & (tail < block_k)
    tokens = counts * block_k - ragged.long() * (block_k - tail)

    dense = (tokens == n_k).all(-1).expand(batch, heads)
    for b, h in dense.nonzero().tolist():
        at = slice(b, b + 1), slice(h, h + 1)
        out[at] = scaled_dot_product_attention(q[at], k[at], v[at], scale=scale)
    if bool(dense.all()):
        return out

    # A row is one query block of one head: its number, and where its head's key blocks start.
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    flat_tokens = tokens.expand(batch, heads, query_blocks)[~dense].flatten().tolist()
    numbers = torch.arange(batch * heads * query_blocks).view(batch, heads, query_blocks)[~dense]
    for row, kept in zip(numbers.flatten().tolist(), flat_tokens, strict=True):
        last = row % query_blocks == query_blocks - 1
        rows_of[kept, n_q - (query_blocks - 1) * block_q if last else block_q].append(row)

    q_blocks, k_blocks, v_blocks = _blocks(q, block_q), _blocks(k, block_k), _blocks(v, block_k)
    all_ids = ids.expand(batch, heads, query_blocks, -1).reshape(-1, ids.shape[-1])
    for (kept, length), rows in rows_of.items():
        chunk = max(1, GATHER_BYTES // max(1, 2 * kept * d * k.element_size()))
        for start in range(0, len(rows), chunk):
            part = torch.tensor(rows[start : start + chunk])
            if kept == 0:
                result = q.new_zeros(len(part), length, v.shape[-1])
            else:
                entries = -(-kept // block_k)
                base = (part // query_blocks * key_blocks)[:, None]
                wanted = (all_ids[part, :entries] + base).flatten()
                keys = k_blocks.index_select(0, wanted).view(len(part), 1, entries * block_k, d)
                values = v_blocks.index_select(0, wanted).view(len(part), 1, entries * block_k, -1)
                result = scaled_dot_product_attention(
                    q_blocks[part, None, :length],
                    keys[:, :, :kept],
                    values[:, :, :kept],
                    scale=scale,
                )[:, 0]
            _scatter(out, result, part, query_blocks, block_q)
    return out


def _scatter(out: Tensor, result: Tensor, rows: Tensor, query_blocks: int, block_q: int) -> None:
    """Writes ``result`` [R, M, D] of query blocks ``rows`` [R] into ``out`` [B, H, N_q, D]."""
    batch_head, block = rows // query_blocks, rows % query_blocks
    b, h = batch_head // out.shape[1], batch_head % out.shape[1]
    positions = (block * block_q)[:, None] + torch.arange(result.shape[1])
    out[b[:, None], h[:, None], positions] = result
