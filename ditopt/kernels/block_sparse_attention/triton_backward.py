"""Block-sparse attention backward in plain Triton (sm_80 and later); equals `reference.backward`.

Two kernels recompute the weights from the log-sum-exp: `triton_grad_queries`, then
`triton_grad_keys` along transposed lists. dtype: matrix products in the inputs' dtype, sums in
float32. Cost: 14 D FLOPs per kept (query, key) pair (scores and do v^T are computed twice).
Source: FlashAttention-2, arXiv 2307.08691, and LLSA's transposed lists, arXiv 2512.16615.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from .ops import empty_output
from .triton_grad_keys import grad_keys
from .triton_grad_queries import grad_queries
from .triton_lists import transpose
from .triton_tiles import aligned, eighths, list_arguments, per_head, split_head_size, strides

if TYPE_CHECKING:
    from .lists import Partial, Pooled


class Tiles(NamedTuple):
    """One launch: query rows, keys, warps, software-pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def default_tiles(q: Tensor, block_q: int, block_k: int) -> tuple[Tiles, Tiles]:
    """Tiles of `grad_queries` and `grad_keys`; float32 serves tests and only has to fit."""
    if q.dtype == torch.float32:
        small = min(block_q, 32)
        return Tiles(small, 32, 4, 1), Tiles(small, min(block_k, 32), 4, 1)
    keys = Tiles(min(block_q, 64), min(block_k, 64), 4, 2)
    if q.shape[-1] <= 64 and block_q >= 128:
        return Tiles(128, 64, 8, 3), keys
    return Tiles(min(block_q, 64), 64, 4, 2), keys


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
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dk and dv of pooled tokens or empty tensors), as `reference.backward`."""
    batch, heads, n_q, d = q.shape
    grad_out, q, k, v, out = (aligned(x) for x in (grad_out, q, k, v, out))
    lse, grad_lse = lse.contiguous(), grad_lse.float().contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (empty_output(x, x) for x in (q, k, v))
    first, second = split_head_size(d)
    for_queries, for_keys = tiles or default_tiles(q, block_q, block_k)
    lists = (kv_num_blocks, kv_indices, partial, block_lengths, key_bias, pooled)
    arguments = list_arguments(batch, heads, *lists)
    shared = {
        "g_ptr": grad_out, "q_ptr": q, "lse_ptr": lse, "delta_ptr": delta,
        **eighths("g", grad_out), **eighths("q", q),
        "heads": heads, "n_q": n_q, "scale": scale, "qk_scale": scale * math.log2(math.e),
        "BLOCK_Q": block_q, "D": d, "D1": first, "D2": second, "IEEE": q.dtype == torch.float32,
    }  # fmt: skip
    grad_queries[(triton.cdiv(n_q, for_queries.block_m), batch * heads)](
        k_ptr=k, v_ptr=v, out_ptr=out, glse_ptr=grad_lse, dq_ptr=dq, n_k=k.shape[2],
        **eighths("k", k), **eighths("v", v), **eighths("o", out), **strides("dq", dq, "bhm"),
        **arguments, **shared,
        BLOCK_K=block_k, BLOCK_M=for_queries.block_m, BLOCK_N=for_queries.block_n,
        EVEN=for_queries.block_n <= block_k and k.shape[2] % block_k == 0,
        HAS_PARTIAL=partial is not None, HAS_LENGTHS=block_lengths is not None,
        HAS_BIAS=key_bias is not None, HAS_POOLED=pooled is not None,
        num_warps=for_queries.num_warps, num_stages=for_queries.num_stages,
    )  # fmt: skip

    key_blocks = triton.cdiv(k.shape[2], block_k)
    entries = _transposed(batch, heads, kv_num_blocks, kv_indices, key_blocks, partial)
    rest = {"masks_ptr": arguments["masks_ptr"], "masks": arguments["masks"]}
    common = {
        **shared, "BLOCK_M": for_keys.block_m,
        "num_warps": for_keys.num_warps, "num_stages": for_keys.num_stages,
    }  # fmt: skip
    grad_keys[(key_blocks * (block_k // for_keys.block_n), batch * heads)](
        k_ptr=k, v_ptr=v, dk_ptr=dk, dv_ptr=dv, n_k=k.shape[2],
        **eighths("k", k), **eighths("v", v),
        **strides("dk", dk, "bhn"), **strides("dv", dv, "bhn"),
        **entries, **rest, lengths_ptr=arguments["lengths_ptr"], bias_ptr=arguments["bias_ptr"],
        **strides("b", per_head(key_bias, batch, heads), "bh"),
        bits_ptr=None, **strides("w", None, "bhq"), **common,
        BLOCK_K=block_k, BLOCK_N=for_keys.block_n, HAS_PARTIAL=partial is not None,
        HAS_LENGTHS=block_lengths is not None, HAS_BIAS=key_bias is not None, POOLED=False,
    )  # fmt: skip
    if pooled is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    pooled_k, pooled_v = aligned(pooled.k), aligned(pooled.v)
    pooled_dk, pooled_dv = empty_output(pooled_k, pooled_k), empty_output(pooled_v, pooled_v)
    bias, bits = per_head(pooled.bias, batch, heads), per_head(pooled.bits, batch, heads)
    nothing = dict.fromkeys(entries, None) | {
        name: 0 for name in entries if name.startswith("stride") or name.endswith("width")
    }
    grad_keys[(triton.cdiv(pooled_k.shape[2], for_keys.block_n), batch * heads)](
        k_ptr=pooled_k, v_ptr=pooled_v, dk_ptr=pooled_dk, dv_ptr=pooled_dv,
        n_k=pooled_k.shape[2],
        **eighths("k", pooled_k), **eighths("v", pooled_v),
        **strides("dk", pooled_dk, "bhn"), **strides("dv", pooled_dv, "bhn"),
        **nothing, masks_ptr=None, masks=0, lengths_ptr=None, bias_ptr=bias,
        **strides("b", bias, "bh"), bits_ptr=bits, **strides("w", bits, "bhq"), **common,
        BLOCK_K=for_keys.block_n, BLOCK_N=for_keys.block_n, HAS_PARTIAL=False, HAS_LENGTHS=False,
        HAS_BIAS=True, POOLED=True,
    )  # fmt: skip
    return dq, dk, dv, pooled_dk, pooled_dv


def _transposed(
    batch: int,
    heads: int,
    counts: Tensor,
    ids: Tensor,
    key_blocks: int,
    partial: Partial | None,
) -> dict[str, Tensor | int | None]:
    """What `grad_keys` is told about both lists, by name."""
    starts, entries = transpose(counts, ids, key_blocks)
    starts, entries = starts.expand(batch, heads, -1), entries.expand(batch, heads, -1)
    some_starts = some_entries = mask_ids = None
    if partial is not None:
        some_starts, some_entries = transpose(partial.num_blocks, partial.indices, key_blocks)
        some_starts = some_starts.expand(batch, heads, -1)
        some_entries = some_entries.expand(batch, heads, -1)
        mask_ids = partial.mask_ids.contiguous().expand(batch, heads, -1, -1)
    return {
        "starts_ptr": starts,
        "entries_ptr": entries,
        "width": ids.shape[-1],
        "some_starts_ptr": some_starts,
        "some_entries_ptr": some_entries,
        "some_width": 0 if partial is None else partial.indices.shape[-1],
        "mask_ids_ptr": mask_ids,
        **strides("s", starts, "bh"),
        **strides("e", entries, "bh"),
        **strides("ss", some_starts, "bh"),
        **strides("se", some_entries, "bh"),
        **strides("mi", mask_ids, "bh"),
    }
