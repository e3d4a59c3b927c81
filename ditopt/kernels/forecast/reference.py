"""The specification: a weighted sum in PyTorch, accumulated in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forecast(base: Tensor | None, residuals: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """`base + sum_j coefficients[j] * residuals[j]`, accumulated in fp32 (fp64 for fp64 inputs).

    The coefficients are a tensor and not floats, so that one compilation of this function serves
    every row of a schedule.

    Args:
        base: input of the block stack at this call, or None when the stored tensors are outputs
            and not residuals.
        residuals: k >= 1 tensors of base's shape and dtype, newest first.
        coefficients: [k], on the residuals' device.

    Returns:
        A new tensor with the shape and dtype of the residuals.
    """
    dtype = residuals[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    weights = coefficients.to(wide).unbind()
    if base is None:
        total = residuals[0].to(wide) * weights[0]
        residuals, weights = residuals[1:], weights[1:]
    else:
        total = base.to(wide)
    for residual, weight in zip(residuals, weights, strict=True):
        total = torch.addcmul(total, residual.to(wide), weight)
    return total.to(dtype)
