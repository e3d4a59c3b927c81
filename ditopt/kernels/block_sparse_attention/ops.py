"""``torch.ops.ditopt.block_sparse_attention``: schema, fake implementation, device dispatch.

CPU runs `cpu_native`, where that does not compile `cpu`; CUDA runs `hopper` where that kernel takes
the call, else `triton` (both are imported on the first launch: this module needs no Triton). The
output has q's shape and dtype and always lies in memory as [B, N_q, H, D]: what follows in a DiT,
``out.transpose(1, 2).flatten(2)``, is then free. The fake says the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, cpu_native

_NAME = "ditopt::block_sparse_attention"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, "
    "Tensor kv_indices, int block_q, int block_k, float scale) -> Tensor",
)


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised output [B, H, N_q, D] that lies in memory as [B, N_q, H, D]."""
    batch, heads, n_q, _ = q.shape
    return q.new_empty(batch, n_q, heads, v.shape[-1]).transpose(1, 2)


@torch.library.impl(_NAME, "cpu")
def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    args = (q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale, empty_output(q, v))
    if cpu_native.reason_to_decline(q) is not None:
        return cpu.block_sparse_attention(*args)
    cpu_native.forward(*args)
    return args[-1]


@torch.library.impl(_NAME, "cuda")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    from . import hopper, triton  # Triton is imported on the first launch only

    kernel = triton if hopper.reason_to_decline(q, block_q, block_k) else hopper
    out: Tensor = kernel.forward(q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale)[0]
    return out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    return empty_output(q, v)


torch.library.register_fake(_NAME, _fake)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """The registered operator, typed: what Dynamo records is ``ditopt::block_sparse_attention``."""
    out: Tensor = torch.ops.ditopt.block_sparse_attention.default(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale
    )
    return out
