# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""Gradients of keys and values in plain Triton, along transposed lists.

A key block walks the query blocks that list it, a tile of pooled tokens all of them; no atomics, so
gradients repeat bit by bit. Cost: 8 D FLOPs per kept (query, key) pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    accumulate,
    inner,
    load_tile,
    store_tile,
    test_bits,
)


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
def grad_keys(
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
    """Gradients of one tile of keys and values, or of pooled ones under POOLED."""
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
