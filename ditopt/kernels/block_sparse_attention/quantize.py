# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""8-bit operands of attention: what `reference_8bit.quantize` specifies, as Triton kernels.

Q and K become int8, K after its token mean is subtracted (softmax does not see it). V becomes e4m3
per channel, transposed, tokens of each group of 16 in `TOKEN_ORDER`. Memory-bound: 2 bytes read
and 1 written per element, and one more read of K and V for the mean and the largest value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = 448.0
ROWS = 128


class Quantized(NamedTuple):
    """Operands of `gluon_8bit`.

    q int8 [B, H, N_q, D] with q_scale float32 [B, H, N_q], which holds the softmax scale and
    log2(e); k int8 [B, H, N_k, D] with k_scale float32 [B, H, key blocks]; v as it came, or e4m3
    [B, H, D, N_k rounded up to 128] with v_scale float32 [B, H, D].
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None


@triton.jit
def _to_int8(x):
    """Rounded to nearest, ties away from zero."""
    return (x + tl.where(x >= 0, 0.5, -0.5)).to(tl.int8)


@triton.jit
def _quantize_rows(
    x_ptr, mean_ptr, out_ptr, scale_ptr, stride_b, stride_h, stride_n, heads, n, factor,
    D: tl.constexpr, ROWS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Int8 rows of one (batch, head); one scale per row, or per ROWS rows less their mean."""
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    offs = block * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    inside = (offs < n)[:, None]
    base = x_ptr + (bh // heads) * stride_b + (bh % heads) * stride_h
    x = tl.load(base + offs[:, None].to(tl.int64) * stride_n + cols[None, :], mask=inside, other=0)
    x = x.to(tl.float32)
    if PER_BLOCK:
        x = tl.where(inside, x - tl.load(mean_ptr + bh * D + cols)[None, :], 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) / 127.0, 1e-12)
        tl.store(scale_ptr + bh * tl.num_programs(0) + block, scale)
        x = _to_int8(x / scale)
    else:
        row_scale = tl.maximum(tl.max(tl.abs(x), 1) / 127.0, 1e-12)
        tl.store(scale_ptr + bh * n + offs, row_scale * factor, mask=offs < n)
        x = _to_int8(x / row_scale[:, None])
    tl.store(out_ptr + (bh * n + offs[:, None]) * D + cols[None, :], x, mask=inside)


@triton.jit
def _quantize_values(
    v_ptr, scale_ptr, out_ptr, stride_b, stride_h, stride_n, heads, n, padded,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """e4m3 [D, ROWS] of one (batch, head), tokens in the order of the kernel's registers."""
    start = tl.program_id(0) * ROWS
    bh = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, ROWS)
    # Position 4 t + 2 b + c of a group of 16 holds token 8 b + 2 t + c.
    token = start + (at & -16) + ((at >> 1) & 1) * 8 + ((at >> 2) & 3) * 2 + (at & 1)
    cols = tl.arange(0, D)
    base = v_ptr + (bh // heads) * stride_b + (bh % heads) * stride_h
    v = tl.load(
        base + token[:, None].to(tl.int64) * stride_n + cols[None, :],
        mask=(token < n)[:, None], other=0,
    )  # fmt: skip
    v = v.to(tl.float32) / tl.load(scale_ptr + bh * D + cols)[None, :]
    out = tl.trans(v.to(tl.float8e4nv))
    tl.store(out_ptr + (bh * D + cols[:, None]) * padded + start + at[None, :], out)


def quantize(
    q: Tensor, k: Tensor, v: Tensor, block_k: int, scale: float, *, values: bool
) -> Quantized:
    """8-bit operands of q, k, v [B, H, N, D], D a power of two; V too where ``values``."""
    batch, heads, n_q, d = q.shape
    n_k = k.shape[2]
    new = q.new_empty
    q8, k8 = (new(*x.shape, dtype=torch.int8) for x in (q, k))
    q_scale = new(batch, heads, n_q, dtype=torch.float32)
    k_scale = new(batch, heads, triton.cdiv(n_k, block_k), dtype=torch.float32)
    mean = k.mean(2, dtype=torch.float32).contiguous()
    pairs = batch * heads
    for x, out, scales, rows, per_block in (
        (q, q8, q_scale, 64, False),
        (k, k8, k_scale, block_k, True),
    ):
        _quantize_rows[(triton.cdiv(x.shape[2], rows), pairs)](
            x, mean, out, scales, *x.stride()[:3], heads, x.shape[2], scale * math.log2(math.e),
            D=d, ROWS=rows, PER_BLOCK=per_block,
        )  # fmt: skip
    if not values:
        return Quantized(q8, q_scale, k8, k_scale, v, None)
    padded = triton.cdiv(n_k, ROWS) * ROWS
    largest = torch.linalg.vector_norm(v, math.inf, 2, dtype=torch.float32)
    v_scale = (largest / E4M3_MAX).clamp_min(1e-12).contiguous()
    v8 = new(batch, heads, d, padded, dtype=torch.float8_e4m3fn)
    _quantize_values[(padded // ROWS, pairs)](
        v, v_scale, v8, *v.stride()[:3], heads, n_k, padded, D=d, ROWS=ROWS
    )
    return Quantized(q8, q_scale, k8, k_scale, v8, v_scale)
