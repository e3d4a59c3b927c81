"""The output error of every candidate pattern of a head, at the price of one dense pass.

Attention over a key block alone gives an output o_j and a log-sum-exp l_j per query. Any union of
blocks is their mixture with weights softmax(l_j over the union) (attention.md, Appendix A9), so the
expensive part is computed once per head and every candidate costs one small matrix product. Errors
are those of the output, not of the attention weights: a head whose values hardly differ tolerates
a low recall (Appendix A5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SCRATCH_BYTES = 256 << 20
"""Largest score tile that is held at a time; more heads than fit are taken in turns."""


@dataclass(frozen=True)
class CandidateErrors:
    """Sums over batch, queries and channels, float64 on the CPU.

    Attributes:
        squared_error: [H, C] ``|o_candidate - o_dense|^2``.
        squared_norm: [H] ``|o_dense|^2``; their ratio's root is the relative L2 error.
    """

    squared_error: Tensor
    squared_norm: Tensor


@torch.no_grad()
def candidate_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
) -> CandidateErrors:
    """Output error of each candidate against dense attention.

    Args:
        q: [B, H, N_q, D], any floating dtype; computed in float32.
        k: [B, H, N_k, D].
        v: [B, H, N_k, D].
        keep: bool [C, QB, KB], the blocks that each candidate keeps; without any, zeros come out.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
        scale: factor of the scores.

    Returns:
        Errors and norms per head. Cost: one dense attention, and 2 C D FLOPs per query and key
        block.
    """
    batch, heads, n_q, _ = q.shape
    per_head = 4 * block_q * k.shape[2]
    chunk = max(1, min(heads, _SCRATCH_BYTES // (per_head * batch)))
    error = torch.zeros(heads, keep.shape[0], dtype=torch.float64)
    norm = torch.zeros(heads, dtype=torch.float64)
    keep = keep.to(q.device)
    for first in range(0, heads, chunk):
        part = slice(first, first + chunk)
        keys, values = (_key_blocks(t[:, part].float(), block_k) for t in (k, v))
        for i, start in enumerate(range(0, n_q, block_q)):
            rows = slice(start, min(start + block_q, n_q))
            tile = q[:, part, rows].float() * scale
            blocks, lse = _attend_blocks(tile, keys, values, k.shape[2])
            dense = _mix(blocks, lse, keep.new_ones(1, keep.shape[2]))
            sparse = _mix(blocks, lse, keep[:, i])
            error[part] += (sparse - dense).square().sum(dim=(0, 2, 4), dtype=torch.float64).cpu()
            norm[part] += dense.square().sum(dim=(0, 2, 3, 4), dtype=torch.float64).cpu()
    return CandidateErrors(error, norm)


def _key_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, KB, block, D], zeros past the end."""
    batch, heads, n, dim = x.shape
    return F.pad(x, (0, 0, 0, -n % block)).view(batch, heads, -1, block, dim)


def _attend_blocks(tile: Tensor, keys: Tensor, values: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    """Attention of one query block to each key block alone.

    Returns:
        Outputs [B, H, bq, KB, D] and natural-log LSE [B, H, bq, KB].
    """
    batch, heads, key_blocks, block, _ = keys.shape
    scores = (tile @ keys.flatten(2, 3).transpose(-1, -2)).view(batch, heads, -1, key_blocks, block)
    scores[..., -1, n_k - (key_blocks - 1) * block :] = float("-inf")
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1)
    outputs = weights.transpose(2, 3) @ values
    outputs = outputs.transpose(2, 3) / total[..., None]
    return outputs, top[..., 0] + total.log()


def _mix(blocks: Tensor, lse: Tensor, keep: Tensor) -> Tensor:
    """Outputs [B, H, bq, C, D] of attention to the kept blocks, keep [C, KB]."""
    kept = lse[..., None, :].masked_fill(~keep, float("-inf"))
    weights = torch.softmax(kept, dim=-1).nan_to_num_(0.0)  # NaN: nothing kept, the output is zero
    return weights @ blocks
