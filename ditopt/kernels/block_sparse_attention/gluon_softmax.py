# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""The softmax of `gluon`'s kernel from one key tile to the next, and the output's rescaling.

The weights are 2^(s - m), s in log2 units; sum and output are in units of 2^m. Any reference point
m does, because the division by the sum cancels it. Usually m is the row's maximum so far. With
RESCALE = "lazy" it moves only where the maximum has grown by more than 2^8 beyond it
(FlashAttention-4, arXiv 2603.05451, on conditional rescaling); after the first tiles it stays
for nearly all rows, and a warp whose rows all stay jumps over the multiplications.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .rescale_ptx import rescale_operands, rescale_text

# Of four neighbours in an output tile two and two are of one row, and a thread has two rows.
_TEXT_8 = gl.constexpr(rescale_text(8, (0, 2)))
_TEXT_16 = gl.constexpr(rescale_text(16, (0, 2)))
_TEXT_32 = gl.constexpr(rescale_text(32, (0, 2)))
_OPERANDS_8 = gl.constexpr(rescale_operands(8))
_OPERANDS_16 = gl.constexpr(rescale_operands(16))
_OPERANDS_32 = gl.constexpr(rescale_operands(32))


@gluon.jit
def _scaled(o, alpha, D: gl.constexpr, RESCALE: gl.constexpr):
    """Output [64, D] times alpha [64], which is in the layout of its rows; a thread has D / 2."""
    factors = alpha[:, None]
    if RESCALE != "lazy":
        o = o * factors
    elif D >= 64:
        o = gl.inline_asm_elementwise(
            _TEXT_32, _OPERANDS_32, [o, factors], dtype=gl.float32, is_pure=True, pack=32
        )
    elif D == 32:
        o = gl.inline_asm_elementwise(
            _TEXT_16, _OPERANDS_16, [o, factors], dtype=gl.float32, is_pure=True, pack=16
        )
    else:
        o = gl.inline_asm_elementwise(
            _TEXT_8, _OPERANDS_8, [o, factors], dtype=gl.float32, is_pure=True, pack=8
        )
    return o


@gluon.jit
def _rescale(
    o1, o2, alpha, rows1: gl.constexpr, rows2: gl.constexpr,
    D1: gl.constexpr, D2: gl.constexpr, RESCALE: gl.constexpr,
):  # fmt: skip
    """The output so far, in units of the new reference point."""
    o1 = _scaled(o1, gl.convert_layout(alpha, rows1), D1, RESCALE)
    if D2 > 0:
        o2 = _scaled(o2, gl.convert_layout(alpha, rows2), D2, RESCALE)
    return o1, o2


@gluon.jit
def _first_softmax(s, qk_scale):
    """(weights, m, sum) of a row's first tile: m is its maximum, 0 where it has no key.

    m is finite from here on, so that no difference of two m is infinity less infinity.
    """
    m = gl.max(s, 1)
    m = gl.where(m == float("-inf"), 0.0, m * qk_scale)
    p = gl.exp2(s * qk_scale - m[:, None])
    return p, m, gl.sum(p, 1)


@gluon.jit
def _softmax(s, m, norm, qk_scale, RESCALE: gl.constexpr):
    """(weights, new m, new sum, factor of what was summed before) of a further tile."""
    m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
    if RESCALE == "lazy":
        # Weights reach 2^8 instead of 1. float16 ends at 2^16 and bfloat16 at 2^127, both keep
        # their relative precision up there, and float32 sums of n weights stay under 2^8 n.
        m_new = gl.where(m_new > m + 8.0, m_new, m)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * qk_scale - m_new[:, None])
    return p, m_new, norm * alpha + gl.sum(p, 1), alpha
