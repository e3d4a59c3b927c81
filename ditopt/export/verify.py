"""Numerical comparison of an engine, or of a step on the way to one, with the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditopt.export.values import describe_result

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative L2 error by dtype; the half formats' are about eight roundings."""


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in fp64; infinite if not alike."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return float("inf")
    wanted = expected.double()
    scale = float(wanted.norm())
    difference = float((result.double() - wanted).norm())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    error = difference / scale
    return error if error == error else float("inf")  # NaN is no small error


def worst_error(result: Any, expected: Any) -> float:
    """The largest relative error over the tensors of a result."""
    got, wanted = describe_result(result)[1], describe_result(expected)[1]
    if len(got) != len(wanted):
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def tolerance(result: Any) -> float:
    """What rounding may explain: that of the coarsest dtype among the result's tensors."""
    dtypes = {tensor.dtype for tensor in describe_result(result)[1]}
    return max((_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)
