"""Hierarchical top-k attention in plain PyTorch: the specification (LLSA, arXiv 2512.16615).

A pooled token of level l is the mean of `block` ** l consecutive tokens (fewer at the end); there
are ceil(N / block ** l) of them. Selection goes from coarse to fine:

- at the coarsest level L every pooled query scores all pooled keys and keeps the best `top_k`;
- at level l < L it scores the children of what its parent kept: `top_k * block` pooled keys.

A query attends to the tokens of the level-1 blocks that its block kept and, with `coarse`, also to
pooled tokens that stand for everything else: at levels 1 to L - 1 the candidates it was scored
against, at level L all; each counts as often as it has tokens (its score is raised by their
logarithm). Regions overlap, as in the paper. Ties go to the lower id; queries and keys are one
sequence. Means and scores accumulate in float32 (float64 for float64).

Cost for each query: `top_k * block * L` keys and the pooled ones of level L, which `levels` keeps
at 256 at most: O(N log N). Source: attention.md 4.13.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditopt.kernels.block_selection.reference import block_lengths, pool

COARSEST = 256  # pooled tokens of the last level, at most


def levels(n: int, block: int = 16) -> int:
    """``ceil(log_block(n / 256))``, at least 1: how often to pool."""
    count, pooled = 1, -(-n // block)
    while pooled > COARSEST:
        count, pooled = count + 1, -(-pooled // block)
    return count


def select(q: Tensor, k: Tensor, block: int, top_k: int, depth: int, scale: float) -> list[Tensor]:
    """What each level keeps, level 1 first: ids int32 [B, H, pooled queries, kept], ascending."""
    found: list[Tensor] = []
    for level in range(depth, 0, -1):
        size = block**level
        scores = (pool(q, size) * scale) @ pool(k, size).transpose(-1, -2)
        count = scores.shape[-1]
        if found:
            scores = scores.masked_fill(~candidates(found[-1], block, count), -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : min(top_k, count)]
        found.append(best.sort(-1).values.int())
    return found[::-1]


def candidates(parents: Tensor, block: int, count: int) -> Tensor:
    """Bool [B, H, count, count]: children of what the parent of each pooled query kept."""
    kept = torch.zeros(
        *parents.shape[:3], -(-count // block), dtype=torch.bool, device=parents.device
    )
    kept.scatter_(-1, parents.long(), value=True)
    return kept.repeat_interleave(block, 2)[:, :, :count].repeat_interleave(block, 3)[..., :count]


def select_blocks(
    q: Tensor, k: Tensor, block: int, top_k: int, depth: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The lists of level 1 for `block_sparse_attention`: counts [B, H, QB] and ids [.., top_k]."""
    ids = select(q, k, block, top_k, depth, scale)[0]
    return torch.full_like(ids[..., 0], ids.shape[-1]), ids


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    top_k: int,
    depth: int,
    coarse: bool,
    scale: float,
) -> Tensor:
    """Output [B, H, N, D] in q's dtype for q, k, v [B, H, N, D] of one sequence."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    n = q.shape[2]
    kept = select(q, k, block, top_k, depth, scale)
    fine = torch.zeros(*kept[0].shape[:3], -(-n // block), dtype=torch.bool, device=q.device)
    fine.scatter_(-1, kept[0].long(), value=True)
    keys, values, masks = [k.to(accumulate)], [v.to(accumulate)], [_spread(fine, block, n, n)]
    bias = [torch.zeros(n, dtype=accumulate, device=q.device)]
    for level in range(1, depth + 1) if coarse else ():
        size = block**level
        keys.append(pool(k, size))
        values.append(pool(v, size))
        bias.append(block_lengths(n, size, q.device).to(accumulate).log())
        count = keys[-1].shape[2]
        if level == depth:
            masks.append(torch.ones_like(masks[0][..., :1]).expand(*masks[0].shape[:3], count))
        else:
            seen = candidates(kept[level], block, count)
            masks.append(seen.repeat_interleave(size, 2)[:, :, :n])
    scores = (q.to(accumulate) * scale) @ torch.cat(keys, 2).transpose(-1, -2) + torch.cat(bias)
    weights = scores.masked_fill(~torch.cat(masks, -1), -math.inf).softmax(-1)
    return (weights @ torch.cat(values, 2)).to(q.dtype)


def _spread(keep: Tensor, block: int, rows: int, columns: int) -> Tensor:
    return keep.repeat_interleave(block, 2)[:, :, :rows].repeat_interleave(block, 3)[..., :columns]


def kept_fraction(n: int, block: int, top_k: int, depth: int, coarse: bool) -> float:
    """Keys that a query attends to over n: pooled keys count one each."""
    last = -(-n // block**depth)
    kept = top_k * block * (depth if coarse else 1) + (last if coarse else 0)
    return min(1.0, kept / n)
