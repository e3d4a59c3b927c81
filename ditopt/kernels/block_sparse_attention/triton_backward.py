# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""Block-sparse attention backward in plain Triton (sm_80 and later); equals `reference.backward`.

Two kernels recompute the weights from the log-sum-exp. `_grad_queries` walks the lists of query
blocks as `triton._forward` does and also writes delta = sum(do out) - dlse; `_grad_keys` walks the
transposed lists of key blocks, or all query blocks for pooled tokens. No atomics: gradients repeat
bit by bit. dtype: matrix products in the inputs' dtype, sums in float32.

Cost: 14 D FLOPs per kept (query, key) pair (scores and do v^T are computed twice).
Source: FlashAttention-2, arXiv 2307.08691, and LLSA's transposed lists, arXiv 2512.16615.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import empty_output
from .triton_lists import transpose
from .triton_tiles import (
    accumulate,
    aligned,
    block_bits,
    eighths,
    entry_tokens,
    existing,
    inner,
    list_arguments,
    load_bias,
    load_tile,
    per_head,
    split_head_size,
    store_tile,
    strides,
    test_bits,
)

if TYPE_CHECKING:
    from .lists import Partial, Pooled


@triton.jit
def _query_step(
    dq1, dq2, q1, q2, g1, g2, lse2, delta, k_ptr, v_ptr, stride_kn, stride_vn, offs, inside, bias,
    seen, qk_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Adds ds k of one key tile to dq, without the scale."""
    k1, k2 = load_tile(k_ptr, offs, inside, stride_kn, D, D1, D2)
    s = inner(q1, q2, k1, k2, D2, IEEE) * qk_scale
    if BIAS:
        s = s + bias[None, :]
    if MASK:
        s = tl.where(seen, s, float("-inf"))
    p = tl.math.exp2(s - lse2[:, None])
    v1, v2 = load_tile(v_ptr, offs, inside, stride_vn, D, D1, D2)
    ds = p * (inner(g1, g2, v1, v2, D2, IEEE) - delta[:, None])
    return accumulate(dq1, dq2, ds.to(k1.dtype), k1, k2, D2, IEEE)


@triton.jit
def _grad_queries(
    g_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, glse_ptr, delta_ptr, dq_ptr, counts_ptr, ids_ptr,
    some_counts_ptr, some_ids_ptr, mask_ids_ptr, masks_ptr, lengths_ptr, bias_ptr,
    pooled_k_ptr, pooled_v_ptr, pooled_bias_ptr, bits_ptr,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_pkb, stride_pkh, stride_pkn, stride_pvb, stride_pvh, stride_pvn,
    stride_ob, stride_oh, stride_om, stride_dqb, stride_dqh, stride_dqm,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    stride_scb, stride_sch, stride_sib, stride_sih, stride_siq,
    stride_bb, stride_bh, stride_pbb, stride_pbh, stride_wb, stride_wh, stride_wq,
    heads, n_q, n_k, n_pooled, width, some_width, masks, qk_scale, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, EVEN: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POOLED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    pid_m = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // heads
    h = pair % heads
    row = pid_m // (BLOCK_Q // BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = offs_m < n_q
    q_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    g_ptr += b * (stride_gb * 8) + h * (stride_gh * 8)
    out_ptr += b * (stride_ob * 8) + h * (stride_oh * 8)
    k_ptr += b * (stride_kb * 8) + h * (stride_kh * 8)
    v_ptr += b * (stride_vb * 8) + h * (stride_vh * 8)
    stride_kn = stride_kn * 8
    stride_vn = stride_vn * 8
    dq_ptr += b * stride_dqb + h * stride_dqh
    ids_ptr += b * stride_ib + h * stride_ih + row.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
    count = tl.minimum(tl.maximum(count, 0), width)
    if HAS_BIAS:
        bias_ptr += b * stride_bb + h * stride_bh

    g1, g2 = load_tile(g_ptr, offs_m, in_q, stride_gm * 8, D, D1, D2)
    o1, o2 = load_tile(out_ptr, offs_m, in_q, stride_om * 8, D, D1, D2)
    delta = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
    delta -= tl.load(glse_ptr + pair * n_q + offs_m, mask=in_q, other=0.0)
    tl.store(delta_ptr + pair * n_q + offs_m, delta, mask=in_q)
    lse2 = tl.load(lse_ptr + pair * n_q + offs_m, mask=in_q, other=0.0) * LOG2E
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)  # nothing is seen: every weight is masked
    q1, q2 = load_tile(q_ptr, offs_m, in_q, stride_qm * 8, D, D1, D2)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros([BLOCK_M, D2], tl.float32)

    # Only the last entry can be ragged.
    total = tl.cdiv(count * BLOCK_K, BLOCK_N)
    plain = tl.maximum(total - (BLOCK_K + BLOCK_N - 1) // BLOCK_N, 0)
    if EVEN:
        plain = total
    if HAS_LENGTHS or HAS_BIAS:
        plain = 0
    for j in range(plain):
        block, place = entry_tokens(ids_ptr, j, count, BLOCK_K, BLOCK_N)
        offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, False)
        dq1, dq2 = _query_step(
            dq1, dq2, q1, q2, g1, g2, lse2, delta, k_ptr, v_ptr, stride_kn, stride_vn,
            offs, inside, inside, inside, qk_scale, False, False, D, D1, D2, IEEE,
        )  # fmt: skip
    for j in range(plain, total):
        block, place = entry_tokens(ids_ptr, j, count, BLOCK_K, BLOCK_N)
        offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, HAS_LENGTHS)
        bias = load_bias(bias_ptr, offs, inside, HAS_BIAS)
        dq1, dq2 = _query_step(
            dq1, dq2, q1, q2, g1, g2, lse2, delta, k_ptr, v_ptr, stride_kn, stride_vn,
            offs, inside, bias, inside[None, :], qk_scale, HAS_BIAS, True, D, D1, D2, IEEE,
        )  # fmt: skip
    if HAS_PARTIAL:
        some_ids_ptr += b * stride_sib + h * stride_sih + row.to(tl.int64) * stride_siq
        mask_ids_ptr += b * stride_sib + h * stride_sih + row.to(tl.int64) * stride_siq
        some = tl.load(some_counts_ptr + b * stride_scb + h * stride_sch + row)
        some = tl.minimum(tl.maximum(some, 0), some_width)
        in_block = (pid_m % (BLOCK_Q // BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
        for j in range(tl.cdiv(some * BLOCK_K, BLOCK_N)):
            block, place = entry_tokens(some_ids_ptr, j, some, BLOCK_K, BLOCK_N)
            offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, HAS_LENGTHS)
            mask_id, _ = entry_tokens(mask_ids_ptr, j, some, BLOCK_K, BLOCK_N)
            seen = block_bits(
                masks_ptr, mask_id, masks, in_block, place, inside,
                BLOCK_Q, BLOCK_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias = load_bias(bias_ptr, offs, inside, HAS_BIAS)
            dq1, dq2 = _query_step(
                dq1, dq2, q1, q2, g1, g2, lse2, delta, k_ptr, v_ptr, stride_kn, stride_vn,
                offs, inside, bias, seen & inside[None, :], qk_scale, HAS_BIAS, True, D, D1, D2,
                IEEE,
            )  # fmt: skip
    if HAS_POOLED:
        pooled_k_ptr += b * (stride_pkb * 8) + h * (stride_pkh * 8)
        pooled_v_ptr += b * (stride_pvb * 8) + h * (stride_pvh * 8)
        pooled_bias_ptr += b * stride_pbb + h * stride_pbh
        bits_ptr += b * stride_wb + h * stride_wh + row.to(tl.int64) * stride_wq
        for j in range(tl.cdiv(n_pooled, BLOCK_N)):
            offs = j * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = offs < n_pooled
            bias = load_bias(pooled_bias_ptr, offs, inside, True)
            bias = tl.where(test_bits(bits_ptr, offs, inside), bias, float("-inf"))
            dq1, dq2 = _query_step(
                dq1, dq2, q1, q2, g1, g2, lse2, delta, pooled_k_ptr, pooled_v_ptr, stride_pkn * 8,
                stride_pvn * 8, offs, inside, bias, inside, qk_scale, True, False, D, D1, D2, IEEE,
            )  # fmt: skip
    store_tile(dq_ptr, offs_m, in_q, stride_dqm, dq1 * scale, dq2 * scale, D, D1, D2)


@triton.jit
def _key_step(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_qm, stride_gm,
    offs_m, n_q, seen, bias, qk_scale,
    MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Adds ds^T q of one query tile to dk, without the scale, and p^T do to dv."""
    in_q = offs_m < n_q
    q1, q2 = load_tile(q_ptr, offs_m, in_q, stride_qm, D, D1, D2)
    g1, g2 = load_tile(g_ptr, offs_m, in_q, stride_gm, D, D1, D2)
    # A row beyond the queries has do = 0 and delta = 0; whatever is finite may be its weight.
    lse2 = tl.load(lse_ptr + offs_m, mask=in_q, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + offs_m, mask=in_q, other=0.0)
    s = inner(k1, k2, q1, q2, D2, IEEE) * qk_scale
    if HAS_BIAS:
        s = s + bias[:, None]
    if MASK:
        s = tl.where(seen, s, float("-inf"))
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
    p = tl.math.exp2(s - lse2[None, :])
    dv1, dv2 = accumulate(dv1, dv2, p.to(g1.dtype), g1, g2, D2, IEEE)
    ds = p * (inner(v1, v2, g1, g2, D2, IEEE) - delta[None, :])
    dk1, dk2 = accumulate(dk1, dk2, ds.to(q1.dtype), q1, q2, D2, IEEE)
    return dk1, dk2, dv1, dv2


@triton.jit
def _grad_keys(
    g_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, starts_ptr, entries_ptr,
    some_starts_ptr, some_entries_ptr, mask_ids_ptr, masks_ptr, lengths_ptr, bias_ptr, bits_ptr,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_sb, stride_sh, stride_eb, stride_eh, stride_ssb, stride_ssh, stride_seb, stride_seh,
    stride_mib, stride_mih, stride_bb, stride_bh, stride_wb, stride_wh, stride_wq,
    heads, n_q, n_k, width, some_width, masks, qk_scale, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr,
    POOLED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // heads
    h = pair % heads
    block = pid_n // (BLOCK_K // BLOCK_N)
    place = (pid_n % (BLOCK_K // BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = block * BLOCK_K + place
    in_k = offs_n < n_k
    exists = in_k
    if HAS_LENGTHS:
        exists = exists & (place < tl.load(lengths_ptr + block))
    q_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    g_ptr += b * (stride_gb * 8) + h * (stride_gh * 8)
    stride_qm = stride_qm * 8
    stride_gm = stride_gm * 8
    lse_ptr += pair * n_q
    delta_ptr += pair * n_q
    k_ptr += b * (stride_kb * 8) + h * (stride_kh * 8)
    v_ptr += b * (stride_vb * 8) + h * (stride_vh * 8)
    k1, k2 = load_tile(k_ptr, offs_n, exists, stride_kn * 8, D, D1, D2)
    v1, v2 = load_tile(v_ptr, offs_n, exists, stride_vn * 8, D, D1, D2)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = dk1
    dv2 = dv1
    if D2 > 0:
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
        dv2 = tl.zeros([BLOCK_N, D2], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias_ptr += b * stride_bb + h * stride_bh
        bias = tl.load(bias_ptr + offs_n, mask=exists, other=0.0) * 1.4426950408889634
    rows = tl.arange(0, BLOCK_M)
    PARTS: tl.constexpr = BLOCK_Q // BLOCK_M
    if POOLED:
        bits_ptr += b * stride_wb + h * stride_wh
        for j in range(tl.cdiv(n_q, BLOCK_M)):
            word = bits_ptr + (j // PARTS) * stride_wq
            seen = test_bits(word, offs_n, in_k)[:, None]
            dk1, dk2, dv1, dv2 = _key_step(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_qm,
                stride_gm, j * BLOCK_M + rows, n_q, seen, bias, qk_scale, True, HAS_BIAS,
                D, D1, D2, IEEE,
            )  # fmt: skip
    else:
        starts_ptr += b * stride_sb + h * stride_sh + block
        entries_ptr += b * stride_eb + h * stride_eh + tl.load(starts_ptr)
        for j in range((tl.load(starts_ptr + 1) - tl.load(starts_ptr)) * PARTS):
            row = tl.load(entries_ptr + j // PARTS) // width
            offs_m = row * BLOCK_Q + (j % PARTS) * BLOCK_M + rows
            dk1, dk2, dv1, dv2 = _key_step(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_qm,
                stride_gm, offs_m, n_q, in_k, bias, qk_scale, False, HAS_BIAS, D, D1, D2, IEEE,
            )  # fmt: skip
    if HAS_PARTIAL:
        WORDS: tl.constexpr = (BLOCK_K + 31) // 32
        mask_ids_ptr += b * stride_mib + h * stride_mih
        some_starts_ptr += b * stride_ssb + h * stride_ssh + block
        some_entries_ptr += b * stride_seb + h * stride_seh + tl.load(some_starts_ptr)
        for j in range((tl.load(some_starts_ptr + 1) - tl.load(some_starts_ptr)) * PARTS):
            entry = tl.load(some_entries_ptr + j // PARTS)
            in_block = (j % PARTS) * BLOCK_M + rows
            mask_id = tl.load(mask_ids_ptr + entry)
            known = exists & (mask_id >= 0) & (mask_id < masks)
            words = masks_ptr + (mask_id.to(tl.int64) * BLOCK_Q + in_block)[None, :] * WORDS
            words = words + tl.zeros_like(place)[:, None]
            seen = test_bits(words, place[:, None], known[:, None])
            dk1, dk2, dv1, dv2 = _key_step(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_qm,
                stride_gm, (entry // some_width) * BLOCK_Q + in_block, n_q, seen, bias, qk_scale,
                True, HAS_BIAS, D, D1, D2, IEEE,
            )  # fmt: skip
    # A token that does not exist was read as zeros; what its row gathered is no gradient.
    dk1 = tl.where(exists[:, None], dk1 * scale, 0.0)
    dv1 = tl.where(exists[:, None], dv1, 0.0)
    if D2 > 0:
        dk2 = tl.where(exists[:, None], dk2 * scale, 0.0)
        dv2 = tl.where(exists[:, None], dv2, 0.0)
    dk_ptr += b * stride_dkb + h * stride_dkh
    dv_ptr += b * stride_dvb + h * stride_dvh
    store_tile(dk_ptr, offs_n, in_k, stride_dkn, dk1, dk2, D, D1, D2)
    store_tile(dv_ptr, offs_n, in_k, stride_dvn, dv1, dv2, D, D1, D2)


class Tiles(NamedTuple):
    """One launch: query rows, keys, warps, software-pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def default_tiles(q: Tensor, block_q: int, block_k: int) -> tuple[Tiles, Tiles]:
    """Tiles of `_grad_queries` and `_grad_keys`; float32 serves tests and only has to fit."""
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
    _grad_queries[(triton.cdiv(n_q, for_queries.block_m), batch * heads)](
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
    _grad_keys[(key_blocks * (block_k // for_keys.block_n), batch * heads)](
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
    _grad_keys[(triton.cdiv(pooled_k.shape[2], for_keys.block_n), batch * heads)](
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
    """What `_grad_keys` is told about both lists, by name."""
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
