"""``ditopt::linear_remainder``: the linear part of `reference` in blocks, on every device.

Per key block the state ``[phi(k)^T v, sum phi(k)]`` (D x (D + 1), float32) is made once; a query
block's state is the sum over the blocks that are not on its list, one product of the 0/1 matrix of
left-out blocks with all states. 4 N D^2 FLOPs, and 2 QB KB D^2 for the sums: at blocks of 128 and
D = 128, 2 for each pair of tokens, where dense attention has 4 D = 512. Memory: QB + KB states.
Plain PyTorch: matrix products are all there is. Semantics and source: `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import to_blocks

from .reference import feature

_NAME = "ditopt::linear_remainder"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, int block_q, "
    "int block_k, str phi) -> Tensor",
)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] as [B, H, blocks, block, D], the last block filled with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    return padded.reshape(*x.shape[:2], -1, block, x.shape[3])


def _remainder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    phi: str,
) -> Tensor:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n_q, d = q.shape
    keys = _in_blocks(feature(k.to(accumulate), phi), block_k)
    values = v.to(accumulate)
    ones = torch.ones_like(values[..., :1])
    state = keys.transpose(-1, -2) @ _in_blocks(torch.cat([values, ones], -1), block_k)
    left = (~to_blocks(kv_num_blocks, kv_indices, keys.shape[2])).to(accumulate)
    sums = left.expand(batch, heads, -1, -1) @ state.flatten(3)
    sums = sums.reshape(batch, heads, -1, d, state.shape[-1])
    out = _in_blocks(feature(q.to(accumulate), phi), block_q) @ sums
    total = out[..., -1:]
    out = torch.where(total > 0, out[..., :-1] / total.where(total > 0, 1.0), 0.0)
    result = q.new_empty(batch, n_q, heads, values.shape[-1]).transpose(1, 2)
    return result.copy_(out.flatten(2, 3)[:, :, :n_q])


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    phi: str,
) -> Tensor:
    batch, heads, n_q, _ = q.shape
    return q.new_empty(batch, n_q, heads, v.shape[-1]).transpose(1, 2)


for _device in ("cpu", "cuda"):
    torch.library.impl(_NAME, _device)(_remainder)
torch.library.register_fake(_NAME, _fake)
