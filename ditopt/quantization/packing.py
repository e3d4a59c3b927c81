"""Codes of 4 or 2 bits in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def pack(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes below 2^bits, uint8 [N, K], as [N, K bits / 8]; a byte's first column lies lowest.

    K is a multiple of ``8 / bits``.
    """
    per_byte = 8 // bits
    packed = codes[:, ::per_byte]
    for place in range(1, per_byte):
        packed = packed | (codes[:, place::per_byte] << (bits * place))
    return packed


def unpack(packed: Any, n: int, k: int, bits: int = 4) -> Any:
    """The inverse; a tensor, or an `fx.Proxy` to write the operators into a graph."""
    shift, places = aten.bitwise_right_shift.Tensor_Scalar, range(0, 8, bits)
    shifted = [packed if place == 0 else shift(packed, place) for place in places]
    codes = [aten.bitwise_and.Scalar(part, 2**bits - 1) for part in shifted]
    return aten.reshape.default(aten.stack.default(codes, -1), [n, k])
