# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""Gradients of queries in plain Triton: walks the lists of query blocks as `triton_forward` does.

It also writes delta = sum(do out) - dlse, which `triton_grad_keys` reads; `triton_backward`
launches both. Cost: 6 D FLOPs per kept (query, key) pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    accumulate,
    block_bits,
    entry_tokens,
    existing,
    inner,
    load_bias,
    load_tile,
    store_tile,
    test_bits,
)


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
def grad_queries(
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
    """Gradient and delta of one tile of queries; arguments as `triton_forward`."""
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
