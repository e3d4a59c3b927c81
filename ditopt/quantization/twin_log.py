"""Twin-log weights of LRQ-DiT (arXiv 2508.03485): levels of each sign, even in the logarithm.

    w = sign (2^(step q + start) - eta),   q = 0 .. L - 1,   L = 8 in 4 bits, 2 in 2 bits

with a step and a start for each output channel and sign. `eta` bends the scale towards even near
zero; it and the share of a row's magnitudes that is not clipped are searched for each matrix. The
magnitudes of one sign are ranked among themselves: elements of the other sign are left out, not
counted as zeros. With two levels a sign both ends are clipped, else the lower level would be zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditopt.quantization.packing import pack, unpack

aten = torch.ops.aten

_ETAS = {4: (0.05, 0.1, 0.2, 0.4, 0.7, 1.0), 2: (0.05,)}
"""In units of the matrix' root mean square; two levels have no spacing that eta could bend."""
_LOWS = {4: (0.0,), 2: (0.2, 0.3, 0.4, 0.5)}
_HIGHS = {4: (1.0, 0.999, 0.99, 0.98), 2: (0.98, 0.95, 0.9, 0.85, 0.8)}
"""Shares of the ranked magnitudes where the levels begin and end."""


class TwinLog:
    """See the module.

    Args:
        bits: 4 or 2.
    """

    def __init__(self, bits: int) -> None:
        self.name = "twin_log" if bits == 4 else f"twin_log{bits}"
        self.multiple = 8 // bits
        self._bits = bits
        self._levels = 2 ** (bits - 1)

    def parts(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Packed codes [N, K bits / 8]; steps and starts [N, 2], positive first; eta [1]."""
        return {
            "codes": ((n, k * self._bits // 8), torch.uint8),
            "step": ((n, 2), torch.float32),
            "start": ((n, 2), torch.float32),
            "eta": ((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """From [N, K] float32; K is a multiple of `multiple`."""
        unit = weight.square().mean().sqrt().clamp(min=1e-30)
        spans = itertools.product(_LOWS[self._bits], _HIGHS[self._bits])
        ends = [_ends(weight, low, high) for low, high in spans]
        tried = (self._fit(weight, eta * unit, *pair) for eta in _ETAS[self._bits] for pair in ends)
        _, codes, made = min(tried, key=lambda found: float(found[0]))
        return {"codes": pack(codes, self._bits), **made}

    def decode(self, parts: Mapping[str, Any], n: int, k: int, out: torch.dtype) -> Any:
        """The weight [N, K]."""
        codes = unpack(parts["codes"], n, k, self._bits)
        return aten.to.dtype(_decode(codes, parts, self._levels), out)

    def _fit(
        self, weight: Tensor, eta: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Squared error, codes [N, K] and parameters for one choice of eta and range [N, 2]."""
        negative = weight < 0
        magnitude = weight.abs() + eta
        logs = torch.log2(magnitude)
        start = torch.log2(low + eta)
        last = self._levels - 1
        made = {
            "step": (torch.log2(high + eta) - start) / last,
            "start": start,
            "eta": eta.reshape(1),
        }
        column = negative.long()
        steps, starts = (made[name].gather(1, column) for name in ("step", "start"))
        # Among two neighbours the nearer in value, which is not the nearer in the logarithm.
        below = ((logs - starts) / steps.clamp(min=1e-30)).floor().clamp(0, last)
        above = (below + 1).clamp(max=last)
        nearer = (torch.exp2(starts + steps * above) - magnitude).abs() < (
            torch.exp2(starts + steps * below) - magnitude
        ).abs()
        codes = (torch.where(nearer, above, below) + self._levels * column).to(torch.uint8)
        error = (_decode(codes, made, self._levels) - weight).square().sum()
        return error, codes, made


def _ends(weight: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Magnitudes at two shares of those of each row and sign: [N, 2] each."""
    ends = []
    for own in (weight >= 0, weight < 0):
        ranked = weight.abs().where(own, torch.full_like(weight, float("inf"))).sort(1).values
        count = own.sum(1, keepdim=True)
        places = [((count - 1) * share).round().long().clamp(min=0) for share in (low, high)]
        pair = ranked.gather(1, torch.cat(places, 1))
        ends.append(torch.where(count > 0, pair, torch.zeros_like(pair)))
    first, last = torch.stack(ends, -1).unbind(1)
    return first, last


def _decode(codes: Any, parts: Mapping[str, Any], levels: int) -> Any:
    negative = aten.ge.Scalar(codes, levels)
    level = aten.to.dtype(aten.bitwise_and.Scalar(codes, levels - 1), torch.float32)
    step, start = (
        aten.where.self(
            negative,
            aten.slice.Tensor(parts[name], 1, 1, 2),
            aten.slice.Tensor(parts[name], 1, 0, 1),
        )
        for name in ("step", "start")
    )
    power = aten.exp2.default(aten.add.Tensor(aten.mul.Tensor(step, level), start))
    magnitude = aten.sub.Tensor(power, parts["eta"])
    return aten.where.self(negative, aten.neg.default(magnitude), magnitude)
