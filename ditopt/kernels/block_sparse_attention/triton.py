"""Block-sparse attention forward in plain Triton (sm_80 and later): the portable kernel.

Shapes and lists as in `reference`. dtype: bfloat16 and float16 in and out (float32 runs with IEEE
dots, for tests); scores, softmax and accumulation are float32. One program owns one query block (or
a part of at most 128 rows of it) of one head and walks its list; q is kept in registers or shared
memory, K and V tiles are software-pipelined through the id loads. Head sizes that are no power of
two are split into two tiles (72 = 64 + 16, 96 = 64 + 32), so that nothing is multiplied with more
than 15 zeros.

Only the last entry of a list can be ragged (ids ascend), so only that one runs mask code, and loads
that are guarded by 0 <= token < N_k: an id out of range reads nothing. The entries before it are
whole blocks: their ids are clamped to the whole blocks of the tensor, so that rows need no guards
and addresses in a tile are computed once, outside the loop; keys and values of one stride share
them, which at D = 72 to 96 decides how many programs fit a multiprocessor. Where an option hides
keys, every load is guarded. Means of dropped blocks come before the list.

Cost: 4 D FLOPs per kept (query, key) pair; K and V are read once per list entry, mostly from L2
(512 D bytes per 128-token block and query block in 16-bit formats). Source: attention.md 5.2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from .configs import PlainConfig, plain_config
from .ops import empty_output
from .ops_lse import structured
from .triton_forward import _forward
from .triton_tiles import aligned as aligned
from .triton_tiles import eighths, list_arguments, split_head_size

if TYPE_CHECKING:
    from .lists import Partial, Pooled


def default_config(q: Tensor, block_q: int, block_k: int, plainly: bool) -> PlainConfig:
    """The tuned configuration; float32 serves tests and only has to fit."""
    if q.dtype == torch.float32:
        return PlainConfig(min(block_q, 64), 32, 4, 2)
    name = torch.cuda.get_device_name(q.device)
    return plain_config(name, block_q, block_k, int(q.shape[-1]), options=not plainly)


def forward(
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
    *,
    return_lse: bool = False,
    config: PlainConfig | None = None,
    launcher: Any = _forward,
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel; arguments as in `reference`, LSE None unless asked for."""
    batch, heads, n_q, _ = q.shape
    # These choose the program: under symbolic shapes they become constants.
    d, block_q, block_k = int(q.shape[-1]), int(block_q), int(block_k)
    plainly = all(option is None for option in (partial, block_lengths, key_bias, pooled))
    config = config or default_config(q, block_q, block_k, plainly)
    q, k, v = (aligned(x) for x in (q, k, v))
    out = empty_output(q, v)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if return_lse else None
    first, second = split_head_size(d)
    if pooled is not None:
        pooled = pooled._replace(k=aligned(pooled.k), v=aligned(pooled.v))
    lists = (kv_num_blocks, kv_indices, partial, block_lengths, key_bias, pooled)
    pairs = [(k, v)] if pooled is None else [(k, v), (pooled.k, pooled.v)]
    near = bool(max(x.stride(2) for pair in pairs for x in pair) < 1 << 24)
    whole = near and bool(config.block_n <= block_k <= k.shape[2])
    # Assembly needs a GPU: in the interpreter the same numbers come from products with 1.
    lazy = int(config.lazy and whole) * (1 + (q.device.type == "cuda"))
    launcher[(triton.cdiv(n_q, config.block_m), batch * heads)](
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse,
        **eighths("q", q), **eighths("k", k), **eighths("v", v),
        **eighths("o", out), **list_arguments(batch, heads, *lists),
        heads=heads, n_q=n_q, n_k=k.shape[2], qk_scale=scale * math.log2(math.e),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        D=d, D1=first, D2=second, HAS_LSE=return_lse,
        EVEN=config.block_n <= block_k and k.shape[2] % block_k == 0,
        WHOLE=whole, NEAR=near, LAZY=lazy,
        ONE_STRIDE=all(bool(x.stride(2) == y.stride(2)) for x, y in pairs),
        HAS_PARTIAL=partial is not None, HAS_LENGTHS=block_lengths is not None,
        HAS_BIAS=key_bias is not None, HAS_POOLED=pooled is not None,
        POOLED_EVEN=pooled is not None and bool(pooled.k.shape[2] % config.block_n == 0),
        MASKED_STAGES=min(3, config.num_stages), IEEE=q.dtype == torch.float32,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@torch.library.triton_op("ditopt::block_sparse_attention_triton", mutates_args={})
def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """The kernel as an operator that compilers see through: Inductor and AOTInductor embed it."""
    launcher = wrap_triton(_forward)
    lists = (kv_num_blocks, kv_indices)
    return forward(q, k, v, *lists, block_q, block_k, scale, launcher=launcher)[0]


@torch.library.triton_op("ditopt::block_sparse_attention_with_lse_triton", mutates_args={})
def plain_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    partial_num_blocks: Tensor | None = None,
    partial_indices: Tensor | None = None,
    partial_mask_ids: Tensor | None = None,
    masks: Tensor | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    pooled_bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for every option of `ops_lse`; forward only."""
    partial = (partial_num_blocks, partial_indices, partial_mask_ids, masks)
    pooled = (pooled_k, pooled_v, pooled_bias, pooled_bits)
    options = structured((*partial, block_lengths, key_bias, *pooled))
    lists = (kv_num_blocks, kv_indices, block_q, block_k, scale)
    launcher = wrap_triton(_forward)
    out, lse = forward(q, k, v, *lists, *options, return_lse=True, launcher=launcher)
    assert lse is not None
    return out, lse
