# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""The forecast in plain Triton (sm_80 and later), one launch for every row of a schedule.

Everything but the base lies in memory without gaps, as rows of `cols` values. The base may be a
transposed view, as a patch embedding returns it, so a program takes a square of it: reading along
either axis then fills whole memory transactions. Where the base lies like the others the whole
tensor is one row of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLAT = 4096
_SQUARE = 64


@triton.jit
def _forecast(
    base_ptr, out_ptr, row_ptr, r0, r1, r2, r3, r4, r5, r6, r7,
    rows, cols, inner, stride_outer, stride_row, stride_col,
    TERMS: tl.constexpr, HAS_BASE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :].to(tl.int64)
    mask = (row < rows) & (col < cols)
    at = row * cols + col
    total = tl.zeros([ROWS, COLS], tl.float32)
    if HAS_BASE:
        # A row counts through the outer dimension and `inner` rows of each.
        place = (row // inner) * stride_outer + (row % inner) * stride_row + col * stride_col
        total += tl.load(base_ptr + place, mask=mask, other=0.0).to(tl.float32)
    sources = (r0, r1, r2, r3, r4, r5, r6, r7)
    for j in tl.static_range(TERMS):
        value = tl.load(sources[j] + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(row_ptr + j) * value
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def forecast(base: Tensor | None, residuals: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """As `reference.forecast`, for what `api.fuses` accepts; the result is contiguous."""
    newest = residuals[0]
    out = torch.empty_like(newest, memory_format=torch.contiguous_format)
    if base is None or base.is_contiguous():
        rows, cols, inner, strides = 1, newest.numel(), 1, (0, 0, 1)
        block = (1, _FLAT)
    else:
        shape, strides = _as_three(base)
        rows, cols, inner = shape[0] * shape[1], shape[2], shape[1]
        block = (_SQUARE, _SQUARE)
    grid = (triton.cdiv(cols, block[1]), triton.cdiv(rows, block[0]))
    pointers = [*residuals, *[newest] * (8 - len(residuals))]
    with torch.cuda.device_of(newest):
        _forecast[grid](
            newest if base is None else base, out, coefficients, *pointers,
            rows, cols, inner, *strides,
            TERMS=len(residuals), HAS_BASE=base is not None, ROWS=block[0], COLS=block[1],
            num_warps=8,
        )  # fmt: skip
    return out


def _as_three(base: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Sizes and strides (outer, row, column) of a tensor, copied only where three do not do."""
    view = base
    if base.dim() < 3:
        view = base[(None,) * (3 - base.dim())]
    elif base.dim() > 3:
        try:
            view = base.view(-1, *base.shape[-2:])
        except RuntimeError:  # the leading dimensions do not lie one after the other
            view = base.reshape(-1, *base.shape[-2:])
    return (view.shape[0], view.shape[1], view.shape[2]), (
        view.stride(0),
        view.stride(1),
        view.stride(2),
    )
