"""FlashAttention-4 as an executor: the optional extra ``ditopt[fa4]``, Hopper and Blackwell.

``torch.ops.ditopt.block_sparse_attention_fa4`` has the operator's signature and takes the same
lists: kept blocks go in as they are, nothing is converted. ``attention_fa4`` is dense. Both are
opaque to compilers, and compile themselves (CuTe DSL) on the first call of each data type, head
size and block size, for some seconds. Source: Dao-AILab/flash-attention, ``flash_attn/cute``
(4.0.0b36).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .ops import empty_output

_NAME = "ditopt::block_sparse_attention_fa4"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, "
    "Tensor kv_indices, int block_q, int block_k, float scale) -> Tensor",
)


@lru_cache
def installed() -> bool:
    """Whether flash-attn-4 can be imported; looks for it, imports nothing of it."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def reason_to_decline(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why FlashAttention-4 cannot run this call, or None where it can."""
    if q.device.type != "cuda":
        return f"FlashAttention-4 needs q on a CUDA device, got {q.device.type}"
    if not installed():
        return "flash-attn-4 is not installed (pip install 'ditopt[fa4]')"
    if torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return "FlashAttention-4 is for compute capabilities 9.0 and 10.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 takes bfloat16 and float16, q is {q.dtype}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 128:
        return f"FlashAttention-4 takes 16 to 128 channels in multiples of 8, got {q.shape[-1]}"
    if block_q % 64:
        return f"FlashAttention-4 takes multiples of 64 as block_q, got {block_q}"
    if block_k not in (64, 128):
        return f"FlashAttention-4 takes 64 and 128 as block_k, got {block_k}"
    return None


@lru_cache(maxsize=64)
def _zeros(shape: torch.Size, device: torch.device) -> Tensor:
    """Counts of blocks with a mask inside: none."""
    return torch.zeros(shape, dtype=torch.int32, device=device)


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
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    none = _zeros(kv_num_blocks.shape, kv_num_blocks.device)
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=kv_indices,
        full_block_cnt=kv_num_blocks,
        full_block_idx=kv_indices,
        block_size=(block_q, block_k),
    )
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = flash_attn_func(*tokens_first, softmax_scale=scale, block_sparse_tensors=lists)[0]
    return out.transpose(1, 2)


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


_DENSE = "ditopt::attention_fa4"
torch.library.define(_DENSE, "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")


@torch.library.impl(_DENSE, "cuda")
def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Dense attention [B, H, N_q, D] by FlashAttention-4."""
    from flash_attn.cute import flash_attn_func

    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = flash_attn_func(*tokens_first, softmax_scale=scale)[0]
    return out.transpose(1, 2)


def _dense_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return empty_output(q, v)


torch.library.register_fake(_DENSE, _dense_fake)
