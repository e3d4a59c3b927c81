"""Block-sparse attention with 8-bit matrix products, in plain PyTorch: the specification.

Shapes and lists as in `reference`. Q is int8 with one scale per row; K less its mean over tokens is
int8 with one scale per key block (SageAttention 2, arXiv 2411.10958: softmax does not see a
constant added to a row's scores, and K's mean is most of its range). With ``values``, V is e4m3
with one scale per channel and the probabilities, relative to their row's largest, are e4m3 times
256; the sum that divides them is that of the unrounded ones. Products are exact, sums float64.

A kernel rounds probabilities relative to the largest score so far, so it agrees with this
statistically: their errors against exact attention are equal, their outputs are not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Arithmetic = Literal["int8_qk", "int8_qk_e4m3_pv"]
E4M3_MAX = 448.0
P_SCALE = 256.0


def _int8(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` rounded to whole multiples of ``scale``, ties away from zero, as float64."""
    steps = x / scale
    return torch.trunc(steps + torch.where(steps >= 0, 0.5, -0.5)).double() * scale.double()


def round_e4m3(x: Tensor) -> Tensor:
    """``x`` rounded to e4m3, saturating, in its own dtype."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def quantize(q: Tensor, k: Tensor, v: Tensor, block_k: int, *, values: bool) -> tuple[Tensor, ...]:
    """What the 8-bit operands of q, k, v [B, H, N, D] stand for, in float64."""
    q, k = q.float(), k.float()
    q_scale = (q.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    k = k - k.mean(2, keepdim=True)
    blocks = -(-k.shape[2] // block_k)
    padded = torch.nn.functional.pad(k, (0, 0, 0, blocks * block_k - k.shape[2]))
    per_block = padded.reshape(*k.shape[:2], blocks, -1).abs().amax(-1) / 127
    k_scale = per_block.clamp_min(1e-12).repeat_interleave(block_k, 2)[:, :, : k.shape[2], None]
    v8 = v.double()
    if values:
        v_scale = (v.float().abs().amax(2, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
        v8 = round_e4m3(v.float() / v_scale).double() * v_scale.double()
    return _int8(q, q_scale), _int8(k, k_scale), v8


def attend(scores: Tensor, v8: Tensor, *, values: bool) -> Tensor:
    """Output [..., N_q, D] of scores [..., N_q, N_k] and what V [..., N_k, D] stands for."""
    p = torch.exp(scores - scores.amax(-1, keepdim=True)) * P_SCALE
    total = p.sum(-1, keepdim=True)
    p = round_e4m3(p) if values else p
    return p @ v8 / total


def block_sparse_attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    *,
    values: bool,
) -> Tensor:
    """Attention output [B, H, N_q, D] in float64 of 8-bit operands; see the module's docstring."""
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    q8, k8, v8 = quantize(q, k, v, block_k, values=values)
    out = torch.zeros(batch, heads, n_q, v.shape[-1], dtype=torch.float64, device=q.device)
    counts = kv_num_blocks.clamp(0, kv_indices.shape[-1]).expand(batch, heads, -1).tolist()
    lists = kv_indices.expand(batch, heads, -1, -1)
    offsets = torch.arange(block_k, device=q.device)
    for b in range(batch):
        for h in range(heads):
            for i, start in enumerate(range(0, n_q, block_q)):
                ids = lists[b, h, i, : counts[b][h][i]].long()
                kept = (ids[:, None] * block_k + offsets).flatten()
                kept = kept[(kept >= 0) & (kept < n_k)]
                if not kept.numel():
                    continue
                scores = q8[b, h, start : start + block_q] @ k8[b, h, kept].T * scale
                out[b, h, start : start + block_q] = attend(scores, v8[b, h, kept], values=values)
    return out
