"""The forecast on any device: one fused kernel on CUDA, the specification elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from . import reference

MOST_TERMS = 8
"""Residuals that one launch combines; a plan's history is at most as long."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_HAS_TRITON = find_spec("triton") is not None


def forecast(base: Tensor | None, residuals: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """`base + sum_j coefficients[j] * residuals[j]`, accumulated in fp32 (fp64 for fp64 inputs).

    Bound by memory: the kernel reads k + 1 tensors once and writes one. PyTorch's own operators, in
    fp32, move 3 to 4 times as many bytes; they serve CPUs, fp64, and what `fuses` declines.

    Args:
        base: input of the block stack at this call, or None when the stored tensors are outputs
            and not residuals.
        residuals: k >= 1 tensors of base's shape and dtype, newest first.
        coefficients: [k] fp32 (fp64 for fp64 residuals), on the residuals' device.

    Returns:
        A new tensor with the shape and dtype of the residuals, and on CUDA with the strides of the
        newest one.
    """
    if fuses(base, residuals, coefficients):
        from . import triton  # imported on the first launch only

        return triton.forecast(base, residuals, coefficients)
    return reference.forecast(base, residuals, coefficients)


def fuses(base: Tensor | None, residuals: Sequence[Tensor], coefficients: Tensor) -> bool:
    """Whether the fused kernel takes the call.

    Residuals must lie in memory alike and without gaps; the base may have any strides, as the
    transposed view that a patch embedding returns.
    """
    newest = residuals[0]
    return (
        _HAS_TRITON
        and newest.is_cuda
        and newest.dtype in _FLOATS
        and coefficients.dtype == torch.float32
        and len(residuals) <= MOST_TERMS
        and newest.is_contiguous()
        and all(other.is_contiguous() and other.dtype == newest.dtype for other in residuals[1:])
        and (base is None or (base.dtype == newest.dtype and base.dim() >= 1))
    )
