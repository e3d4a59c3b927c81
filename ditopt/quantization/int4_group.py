"""4-bit weights in groups of up to 128 along K, clipped where the squared error is least.

Sixteen evenly spaced levels around zero, w = s (q - 7.5): all sixteen are used, and zero lies
between two of them. A group's range is searched from its largest magnitude down; at 4 bits the
clipped tail costs less than the finer step gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditopt.quantization.packing import pack, unpack

aten = torch.ops.aten

_GROUPS = (128, 64, 32, 16)
_RANGES = 40
_SMALLEST_RANGE = 0.4


class Int4Group:
    """See the module."""

    name = "int4_group"
    multiple = _GROUPS[-1]

    def parts(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Packed codes [N, K / 2] and scales [N, groups]."""
        return {
            "codes": ((n, k // 2), torch.uint8),
            "scale": ((n, k // _group(k)), torch.float16),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """From [N, K] float32; K is a multiple of 16."""
        n, k = weight.shape
        groups = weight.reshape(n, -1, _group(k))
        amax = groups.abs().amax(-1, keepdim=True)
        best = torch.full_like(amax, float("inf"))
        scale = torch.zeros_like(amax)
        for share in torch.linspace(1, _SMALLEST_RANGE, _RANGES).tolist():
            # fp16 as it is stored, at least its smallest number, so that nothing divides by zero.
            tried = (amax * share / 7.5).half().float().clamp(min=6e-8)
            error = (_round(groups, tried) - groups).square().sum(-1, keepdim=True)
            scale = torch.where(error < best, tried, scale)
            best = torch.minimum(error, best)
        codes = (groups / scale + 7.5).round().clamp(0, 15).to(torch.uint8)
        return {"codes": pack(codes.reshape(n, k)), "scale": scale[..., 0].half()}

    def decode(self, parts: Mapping[str, Any], n: int, k: int, out: torch.dtype) -> Any:
        """The weight [N, K]."""
        codes = aten.to.dtype(unpack(parts["codes"], n, k), torch.float32)
        groups = aten.reshape.default(aten.sub.Tensor(codes, 7.5), [n, -1, _group(k)])
        scale = aten.unsqueeze.default(aten.to.dtype(parts["scale"], torch.float32), -1)
        return aten.to.dtype(aten.reshape.default(aten.mul.Tensor(groups, scale), [n, k]), out)


def _group(k: int) -> int:
    return next(size for size in _GROUPS if k % size == 0)


def _round(x: Tensor, scale: Tensor) -> Tensor:
    return ((x / scale + 7.5).round().clamp(0, 15) - 7.5) * scale
