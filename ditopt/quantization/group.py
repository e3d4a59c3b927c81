"""4- or 2-bit weights in groups of up to 128 along K, clipped where the squared error is least.

Evenly spaced levels around zero, w = s (q - (L - 1) / 2) with L = 16 or 4: all of them are used,
and zero lies between two of them. A group's range is searched from its largest magnitude down; in
few bits the clipped tail costs less than the finer step gains.
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
_SMALLEST_RANGE = {4: 0.4, 2: 0.2}


class Group:
    """See the module.

    Args:
        bits: 4 or 2.
    """

    multiple = _GROUPS[-1]

    def __init__(self, bits: int) -> None:
        self.name = f"int{bits}_group"
        self._bits = bits
        self._levels = 2**bits
        self._middle = (self._levels - 1) / 2

    def parts(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Packed codes [N, K bits / 8] and scales [N, groups]."""
        return {
            "codes": ((n, k * self._bits // 8), torch.uint8),
            "scale": ((n, k // _group(k)), torch.float16),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """From [N, K] float32; K is a multiple of 16."""
        n, k = weight.shape
        groups = weight.reshape(n, -1, _group(k))
        amax = groups.abs().amax(-1, keepdim=True)
        best = torch.full_like(amax, float("inf"))
        scale = torch.zeros_like(amax)
        for share in torch.linspace(1, _SMALLEST_RANGE[self._bits], _RANGES).tolist():
            # fp16 as it is stored, at least its smallest number, so that nothing divides by zero.
            tried = (amax * share / self._middle).half().float().clamp(min=6e-8)
            rounded = (self._nearest(groups, tried) - self._middle) * tried
            error = (rounded - groups).square().sum(-1, keepdim=True)
            scale = torch.where(error < best, tried, scale)
            best = torch.minimum(error, best)
        codes = self._nearest(groups, scale).to(torch.uint8).reshape(n, k)
        return {"codes": pack(codes, self._bits), "scale": scale[..., 0].half()}

    def decode(self, parts: Mapping[str, Any], n: int, k: int, out: torch.dtype) -> Any:
        """The weight [N, K]."""
        codes = aten.to.dtype(unpack(parts["codes"], n, k, self._bits), torch.float32)
        groups = aten.reshape.default(aten.sub.Tensor(codes, self._middle), [n, -1, _group(k)])
        scale = aten.unsqueeze.default(aten.to.dtype(parts["scale"], torch.float32), -1)
        return aten.to.dtype(aten.reshape.default(aten.mul.Tensor(groups, scale), [n, k]), out)

    def _nearest(self, x: Tensor, scale: Tensor) -> Tensor:
        places: Tensor = x / scale + self._middle
        return places.round().clamp(0, self._levels - 1)


def _group(k: int) -> int:
    return next(size for size in _GROUPS if k % size == 0)
