# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# ruff: noqa: N803, B007
"""The plain kernel's softmax without its products, and its products without the softmax.

Both walk the kernel's lists in its tiles, warps and ring depth. No kernel of these tiles that does
both is faster than the slower of the two alone: the bound of a head size, measured, as long as no
fewer of their programs fit a multiprocessor than of the kernel's.

Softmax alone takes scores that cost nothing to make: the probabilities of the step before, in the
registers where the products would have left them. It has the maximum, the exponentials, the sum,
the conversion to 16 bits and the rescaling of the accumulator; what is left out of the kernel is
loads, addresses and products. Products alone has the loads and both products of the scores as they
are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ditopt.kernels.block_sparse_attention.triton import default_config
from ditopt.kernels.block_sparse_attention.triton_softmax import scaled
from ditopt.kernels.block_sparse_attention.triton_tiles import (
    accumulate,
    eighths,
    inner,
    list_arguments,
    load_tile,
    split_head_size,
    store_tile,
    tile_from,
)

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _softmax_step(
    acc1, acc2, m, norm, s, qk_scale, D1: tl.constexpr, D2: tl.constexpr, LAZY: tl.constexpr
):  # fmt: skip
    """One step on scores ``s``; the converted probabilities come back as the next scores."""
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    if LAZY > 0:
        m_new = tl.where(m_new > m + 8.0, m_new, m)
    p = tl.math.exp2(s * qk_scale - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    norm = norm * alpha + tl.sum(p, 1)
    acc1 = scaled(acc1, alpha, D1, LAZY)
    if D2 > 0:
        acc2 = scaled(acc2, alpha, D2, LAZY)
    # A pair in bfloat16 is, read as float32, its second number: nothing is left out and added.
    s = tl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; mov.b32 $0, t; mov.b32 $1, $3; }",
        "=f,=f,f,f", [p], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip
    return acc1, acc2, m_new, norm, s


@triton.jit
def _part(
    q_ptr, k_ptr, v_ptr, out_ptr, counts_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, n_q, n_k, width, qk_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LAZY: tl.constexpr, SOFTMAX: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Strides of q, k and v in units of 8 elements, as in `triton._forward`; q as out."""
    pid_m = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    row = pid_m // (BLOCK_Q // BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = offs_m < n_q
    q_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    out_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    k_ptr += b * (stride_kb * 8) + h * (stride_kh * 8)
    stride_vn = stride_kn if ONE_STRIDE else stride_vn
    v_ptr += b * (stride_vb * 8) + h * (stride_vh * 8)
    ids_ptr += b * stride_ib + h * stride_ih + row.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
    count = tl.minimum(tl.maximum(count, 0), width)
    q1, q2 = load_tile(q_ptr, offs_m, in_q, stride_qm * 8, D, D1, D2)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.cdiv(count * BLOCK_K, BLOCK_N)
    if SOFTMAX:
        # One step's products, for values in the layouts that they have in the kernel.
        rows = tl.arange(0, BLOCK_N)
        k1, k2 = load_tile(k_ptr, rows, rows < n_k, stride_kn * 8, D, D1, D2)
        s = inner(q1, q2, k1, k2, D2, False)
        acc1, acc2 = accumulate(acc1, acc2, s.to(k1.dtype), k1, k2, D2, False)
        for j in range(total):
            acc1, acc2, m, norm, s = _softmax_step(
                acc1, acc2, m, norm, s, qk_scale, D1, D2, LAZY
            )  # fmt: skip
        acc1 += (norm + tl.sum(s, 1))[:, None]
    else:
        rows = tl.arange(0, BLOCK_N)
        for j in range(total):
            block = tl.load(ids_ptr + j // (BLOCK_K // BLOCK_N))
            block = tl.minimum(tl.maximum(block, 0), n_k // BLOCK_K - 1)
            start = block * BLOCK_K + (j % (BLOCK_K // BLOCK_N)) * BLOCK_N
            k1, k2 = tile_from(k_ptr, start, rows, stride_kn * 8, D, D1, D2)
            s = inner(q1, q2, k1, k2, D2, False)
            v1, v2 = tile_from(v_ptr, start, rows, stride_vn * 8, D, D1, D2)
            acc1, acc2 = accumulate(acc1, acc2, s.to(v1.dtype), v1, v2, D2, False)
    store_tile(out_ptr, offs_m, in_q, stride_qm * 8, acc1, acc2, D, D1, D2)


def run(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor, block: int, *, softmax: bool
) -> Tensor:
    """One part of attention over these lists (bfloat16, square blocks that divide N).

    The values mean nothing.
    """
    batch, heads, n, d = q.shape
    config = default_config(q, block, block, True)
    first, second = split_head_size(d)
    names = ("counts_ptr", "ids_ptr", "width", "stride_cb", "stride_ch")
    names = (*names, "stride_ib", "stride_ih", "stride_iq")
    lists = list_arguments(batch, heads, counts, ids, None, None, None, None)
    out = torch.empty_like(q)
    _part[(triton.cdiv(n, config.block_m), batch * heads)](
        q, k, v, out, **{name: lists[name] for name in names},
        **eighths("q", q), **eighths("k", k), **eighths("v", v),
        heads=heads, n_q=n, n_k=k.shape[2], qk_scale=d**-0.5 * math.log2(math.e),
        BLOCK_Q=block, BLOCK_K=block, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        D=d, D1=first, D2=second, LAZY=2 * config.lazy, SOFTMAX=softmax,
        ONE_STRIDE=k.stride(2) == v.stride(2),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
