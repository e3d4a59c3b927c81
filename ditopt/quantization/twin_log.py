"""Twin-log weights of LRQ-DiT (arXiv 2508.03485): eight levels a sign, even in the logarithm.

    w = sign (2^(step q + start) - eta),   q = 0 .. 7

with a step and a start for each output channel and sign. `eta` bends the scale towards even near
zero; it and the share of a row's magnitudes that is not clipped are searched for each matrix. The
magnitudes of one sign are ranked among themselves: elements of the other sign are left out, not
counted as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditopt.quantization.packing import pack, unpack

aten = torch.ops.aten

_LEVELS = 8
_ETAS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""In units of the matrix' root mean square."""
_SHARES = (1.0, 0.999, 0.99, 0.98)


class TwinLog:
    """See the module."""

    name = "twin_log"
    multiple = 2

    def parts(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Packed codes [N, K / 2]; steps and starts [N, 2], positive first; eta [1]."""
        return {
            "codes": ((n, k // 2), torch.uint8),
            "step": ((n, 2), torch.float32),
            "start": ((n, 2), torch.float32),
            "eta": ((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """From [N, K] float32 with K even."""
        unit = weight.square().mean().sqrt().clamp(min=1e-30)
        ends = {share: _ends(weight, share) for share in _SHARES}
        tried = (_fit(weight, eta * unit, *ends[share]) for eta in _ETAS for share in _SHARES)
        _, codes, made = min(tried, key=lambda found: float(found[0]))
        return {"codes": pack(codes), **made}

    def decode(self, parts: Mapping[str, Any], n: int, k: int, out: torch.dtype) -> Any:
        """The weight [N, K]."""
        codes = unpack(parts["codes"], n, k)
        return aten.to.dtype(_decode(codes, parts), out)


def _ends(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest magnitude that is kept, of each row and sign: [N, 2] each."""
    ends = []
    for own in (weight >= 0, weight < 0):
        ranked = weight.abs().where(own, torch.full_like(weight, float("inf"))).sort(1).values
        count = own.sum(1, keepdim=True)
        top = ranked.gather(1, ((count - 1) * share).round().long().clamp(min=0))
        pair = torch.cat([ranked[:, :1], top], 1)
        ends.append(torch.where(count > 0, pair, torch.zeros_like(pair)))
    low, high = torch.stack(ends, -1).unbind(1)
    return low, high


def _fit(
    weight: Tensor, eta: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Squared error, codes [N, K] and parameters for one choice of eta and range [N, 2]."""
    negative = weight < 0
    magnitude = weight.abs() + eta
    logs = torch.log2(magnitude)
    start = torch.log2(low + eta)
    made = {
        "step": (torch.log2(high + eta) - start) / (_LEVELS - 1),
        "start": start,
        "eta": eta.reshape(1),
    }
    column = negative.long()
    steps, starts = (made[name].gather(1, column) for name in ("step", "start"))
    # Among two neighbours the nearer in value, which is not the nearer in the logarithm.
    below = ((logs - starts) / steps.clamp(min=1e-30)).floor().clamp(0, _LEVELS - 1)
    above = (below + 1).clamp(max=_LEVELS - 1)
    nearer = (torch.exp2(starts + steps * above) - magnitude).abs() < (
        torch.exp2(starts + steps * below) - magnitude
    ).abs()
    codes = (torch.where(nearer, above, below) + _LEVELS * column).to(torch.uint8)
    error = (_decode(codes, made) - weight).square().sum()
    return error, codes, made


def _decode(codes: Any, parts: Mapping[str, Any]) -> Any:
    negative = aten.ge.Scalar(codes, _LEVELS)
    level = aten.to.dtype(aten.bitwise_and.Scalar(codes, _LEVELS - 1), torch.float32)
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
