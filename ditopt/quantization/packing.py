"""Two 4-bit codes in a byte."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def pack(codes: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 [N, K] with K even, as [N, K / 2]; the even column is the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Any, n: int, k: int) -> Any:
    """The inverse; a tensor, or an `fx.Proxy` to write the operators into a graph."""
    low = aten.bitwise_and.Scalar(packed, 15)
    high = aten.bitwise_right_shift.Tensor_Scalar(packed, 4)
    return aten.reshape.default(aten.stack.default([low, high], -1), [n, k])
