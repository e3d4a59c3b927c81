# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""The plain forward kernel; `triton` launches it and says what it does."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_softmax import softmax_step
from .triton_tiles import (
    block_bits,
    entry_tokens,
    existing,
    load_bias,
    load_tile,
    seen_bias,
    split_tokens,
    store_tile,
)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, ids_ptr,
    some_counts_ptr, some_ids_ptr, mask_ids_ptr, masks_ptr, lengths_ptr, bias_ptr,
    pooled_k_ptr, pooled_v_ptr, pooled_bias_ptr, bits_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_pkb, stride_pkh, stride_pkn,
    stride_pvb, stride_pvh, stride_pvn, stride_ob, stride_oh, stride_om,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    stride_scb, stride_sch, stride_sib, stride_sih, stride_siq,
    stride_bb, stride_bh, stride_pbb, stride_pbh, stride_wb, stride_wh, stride_wq,
    heads, n_q, n_k, n_pooled, width, some_width, masks, qk_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_LSE: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, NEAR: tl.constexpr, ONE_STRIDE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_POOLED: tl.constexpr, POOLED_EVEN: tl.constexpr, LAZY: tl.constexpr,
    MASKED_STAGES: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_bh = tl.program_id(1)
    # Inductor passes Python's floats as float64. A scale of 0 would make -inf * 0 of masked scores.
    qk_scale = tl.maximum(tl.full([], qk_scale, tl.float32), 1e-30)
    b = (pid_bh // heads).to(tl.int64)
    h = (pid_bh % heads).to(tl.int64)
    row = pid_m // (BLOCK_Q // BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = offs_m < n_q
    # NOTE: strides of q, k, v and pooled tokens come in units of 8 elements, so that the compiler
    # knows that rows start at multiples of 16 bytes. Where it did not, D = 72 mixed pipelined with
    # plain loads in one loop, and the program (triton 3.6.0) ended in an illegal memory access.
    q_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    k_ptr += b * (stride_kb * 8) + h * (stride_kh * 8)
    v_ptr += b * (stride_vb * 8) + h * (stride_vh * 8)
    stride_kn = stride_kn * 8
    # One stride is one set of addresses in a tile, which live through the loop.
    stride_vn = stride_kn if ONE_STRIDE else stride_vn * 8
    out_ptr += b * (stride_ob * 8) + h * (stride_oh * 8)
    ids_ptr += b * stride_ib + h * stride_ih + row.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
    count = tl.minimum(tl.maximum(count, 0), width)
    if HAS_BIAS:
        bias_ptr += b * stride_bb + h * stride_bh

    q1, q2 = load_tile(q_ptr, offs_m, in_q, stride_qm * 8, D, D1, D2)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    rows = tl.arange(0, BLOCK_N)
    if HAS_POOLED:
        # NOTE: before the list. Behind it two stages of 128 keys make ptxas serialise the products
        # of both loops (triton 3.6.0: WARPGROUP instructions beside every HGMMA in the SASS).
        pooled_k_ptr += b * (stride_pkb * 8) + h * (stride_pkh * 8)
        pooled_v_ptr += b * (stride_pvb * 8) + h * (stride_pvh * 8)
        stride_pkn = stride_pkn * 8
        stride_pvn = stride_pkn if ONE_STRIDE else stride_pvn * 8
        pooled_bias_ptr += b * stride_pbb + h * stride_pbh
        bits_ptr += b * stride_wb + h * stride_wh + row.to(tl.int64) * stride_wq
        for j in tl.range(tl.cdiv(n_pooled, BLOCK_N), num_stages=2):
            first = j * BLOCK_N
            bias = seen_bias(pooled_bias_ptr, bits_ptr, first, n_pooled, BLOCK_N)
            acc1, acc2, m, norm = softmax_step(
                acc1, acc2, m, norm, q1, q2, pooled_k_ptr, pooled_v_ptr, stride_pkn, stride_pvn,
                first, rows, rows < n_pooled - first, bias, rows, qk_scale,
                NEAR, not POOLED_EVEN, True, False, LAZY, D, D1, D2, IEEE,
            )  # fmt: skip
    # Ids ascend, so only the last entry can be ragged: it is peeled, and the loop has no mask code.
    # Loops with masks have shallower rings: the same depth is more memory there (triton 3.6.0).
    total = tl.cdiv(count * BLOCK_K, BLOCK_N)
    plain = tl.maximum(total - (BLOCK_K + BLOCK_N - 1) // BLOCK_N, 0)
    if EVEN:
        plain = total
    if HAS_LENGTHS or HAS_BIAS:
        plain = 0
    for j in range(plain):
        block, place = entry_tokens(ids_ptr, j, count, BLOCK_K, BLOCK_N)
        if WHOLE:
            block = tl.minimum(tl.maximum(block, 0), n_k // BLOCK_K - 1)
        offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, False)
        first, tokens = split_tokens(block, offs, j, BLOCK_K, BLOCK_N, WHOLE)
        acc1, acc2, m, norm = softmax_step(
            acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, first, tokens, inside,
            rows, rows, qk_scale, WHOLE, not WHOLE, False, False, LAZY, D, D1, D2, IEEE,
        )  # fmt: skip
    # NOTE: in halves of tiles. Masks take registers: in whole ones this loop alone decided how many
    # programs fit a multiprocessor. Where options hide keys it walks the whole list.
    HALVES: tl.constexpr = 2 if WHOLE and BLOCK_N > 16 and not (HAS_LENGTHS or HAS_BIAS) else 1
    TAIL_N: tl.constexpr = BLOCK_N // HALVES
    tail_stages: tl.constexpr = MASKED_STAGES if HALVES == 1 else 2
    for j in tl.range(plain * HALVES, total * HALVES, num_stages=tail_stages):
        block, place = entry_tokens(ids_ptr, j, count, BLOCK_K, TAIL_N)
        offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, HAS_LENGTHS)
        bias = load_bias(bias_ptr, offs, inside, HAS_BIAS)
        first, tokens = split_tokens(block, offs, j, BLOCK_K, TAIL_N, WHOLE)
        acc1, acc2, m, norm = softmax_step(
            acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, first, tokens, inside,
            bias, inside[None, :], qk_scale, WHOLE, True, HAS_BIAS, True, 0, D, D1, D2, IEEE,
        )  # fmt: skip
    if HAS_PARTIAL:
        some_ids_ptr += b * stride_sib + h * stride_sih + row.to(tl.int64) * stride_siq
        mask_ids_ptr += b * stride_sib + h * stride_sih + row.to(tl.int64) * stride_siq
        some = tl.load(some_counts_ptr + b * stride_scb + h * stride_sch + row)
        some = tl.minimum(tl.maximum(some, 0), some_width)
        in_block = (pid_m % (BLOCK_Q // BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
        for j in tl.range(tl.cdiv(some * BLOCK_K, BLOCK_N), num_stages=MASKED_STAGES):
            block, place = entry_tokens(some_ids_ptr, j, some, BLOCK_K, BLOCK_N)
            offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, HAS_LENGTHS)
            mask_id, _ = entry_tokens(mask_ids_ptr, j, some, BLOCK_K, BLOCK_N)
            seen = block_bits(
                masks_ptr, mask_id, masks, in_block, place, inside,
                BLOCK_Q, BLOCK_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias = load_bias(bias_ptr, offs, inside, HAS_BIAS)
            first, tokens = split_tokens(block, offs, j, BLOCK_K, BLOCK_N, WHOLE)
            acc1, acc2, m, norm = softmax_step(
                acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, first, tokens,
                inside, bias, seen & inside[None, :], qk_scale,
                WHOLE, True, HAS_BIAS, True, 0, D, D1, D2, IEEE,
            )  # fmt: skip

    inverse = (1.0 / tl.where(norm == 0.0, 1.0, norm))[:, None]
    acc1 = acc1 * inverse
    if D2 > 0:
        acc2 = acc2 * inverse
    store_tile(out_ptr, offs_m, in_q, stride_om * 8, acc1, acc2, D, D1, D2)
    if HAS_LSE:
        # m is in log2 units; the boundary speaks natural logarithms. log2(0) = -inf for empty rows.
        lse = tl.where(norm == 0.0, float("-inf"), (m + tl.math.log2(norm)) * 0.6931471805599453)
        tl.store(lse_ptr + pid_bh.to(tl.int64) * n_q + offs_m, lse, mask=in_q)
