# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""One step of the online softmax of the plain Triton kernel, in log2 units.

Lazy rescaling: weights are relative to a reference point that need not be the maximum, since
normalisation cancels it. It moves only when the maximum has grown by more than a factor of 2^8, so
that weights stay below 256 and almost every step would multiply the sums by 1; a warp for which
that is so jumps over it (LAZY = 2, in PTX; LAZY = 1 multiplies, LAZY = 0 always moves).
Source: FlashAttention-4 (arXiv 2603.05451), conditional rescaling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rescale_ptx import rescale_operands, rescale_text
from .triton_tiles import accumulate, inner, load_tile, tile_from

# All factors are tested: which ones differ is the layout's. The compiler keeps one test a row.
_TEXT_8 = tl.constexpr(rescale_text(8, range(8)))
_TEXT_16 = tl.constexpr(rescale_text(16, range(16)))
_TEXT_32 = tl.constexpr(rescale_text(32, range(32)))
_REGISTERS_8 = tl.constexpr(rescale_operands(8))
_REGISTERS_16 = tl.constexpr(rescale_operands(16))
_REGISTERS_32 = tl.constexpr(rescale_operands(32))


@triton.jit
def scaled(acc, alpha, WIDTH: tl.constexpr, LAZY: tl.constexpr):
    """``acc`` [M, WIDTH] * ``alpha`` [M]; under LAZY = 2 warps with nothing to do jump over it.

    A warp has a multiple of 16 whole rows, so that a thread has one of WIDTH / 2 numbers.
    """
    factors = alpha[:, None]
    if LAZY < 2:
        acc = acc * factors
    elif WIDTH >= 64:
        acc = tl.inline_asm_elementwise(
            _TEXT_32, _REGISTERS_32, [acc, factors], tl.float32, is_pure=True, pack=32
        )
    elif WIDTH == 32:
        acc = tl.inline_asm_elementwise(
            _TEXT_16, _REGISTERS_16, [acc, factors], tl.float32, is_pure=True, pack=16
        )
    else:
        acc = tl.inline_asm_elementwise(
            _TEXT_8, _REGISTERS_8, [acc, factors], tl.float32, is_pure=True, pack=8
        )
    return acc


@triton.jit
def softmax_step(
    acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, first, rows, inside, bias,
    seen, qk_scale,
    NEAR: tl.constexpr, GUARD: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    LAZY: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One key tile: sums ``acc1``, ``acc2`` and ``norm`` of weights relative to 2^``m``.

    Its tokens are ``first`` + ``rows`` [N], under NEAR at distances below 2^31 elements; under
    GUARD only those ``inside`` exist. ``bias`` [N] counts under BIAS, and may hide keys; ``seen``,
    [1, N] or [M, N], under MASK.
    """
    if NEAR:
        k1, k2 = tile_from(k_ptr, first, rows, stride_kn, D, D1, D2, inside, GUARD)
    else:
        k1, k2 = load_tile(k_ptr, first + rows, inside, stride_kn, D, D1, D2)
    s = inner(q1, q2, k1, k2, D2, IEEE)
    if NEAR:
        v1, v2 = tile_from(v_ptr, first, rows, stride_vn, D, D1, D2, inside, GUARD)
    if BIAS:
        s = s * qk_scale + bias[None, :]
        qk_scale = 1.0
    if MASK:
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    if LAZY > 0:
        m_new = tl.where(m_new > m + 8.0, m_new, m)
    # Where nothing can be hidden every m_new is finite, whatever m was.
    shift = m_new
    if BIAS or MASK:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    norm = norm * alpha + tl.sum(p, 1)
    if not NEAR:
        v1, v2 = load_tile(v_ptr, first + rows, inside, stride_vn, D, D1, D2)
    acc1 = scaled(acc1, alpha, D1, LAZY)
    if D2 > 0:
        acc2 = scaled(acc2, alpha, D2, LAZY)
    acc1, acc2 = accumulate(acc1, acc2, p.to(v1.dtype), v1, v2, D2, IEEE)
    return acc1, acc2, m_new, norm
