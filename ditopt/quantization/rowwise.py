"""8-bit matrix products: one scale for each token and one for each output channel.

    y[m, n] = s_x[m] s_w[n] sum_k q_x[m, k] q_w[n, k] + b[n]

Scales of rows and columns leave the sum over k free of them, so one product with an epilogue does.
Activations are rounded at every call, by their own largest magnitude: ranges move more than tenfold
over the timesteps. The functions here are written in ATen operators. Called with tensors they are
the arithmetic; called with `fx.Proxy` they write the same operators into a graph, plain ones, which
Inductor fuses into the norm, modulation or activation before the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

SMALLEST = 1e-12
"""Floor of a row's largest magnitude, so that a row of zeros has a scale."""

FAST_ACCUMULATION = True
"""Hopper's fp8 units add up at about 14 bits instead of promoting to float32 every few steps; see
benchmarks/results/quantization_h200.json for its error and its speed."""


def quantize_rows(x: Any, largest: float, dtype: torch.dtype) -> tuple[Any, Any]:
    """Round each row to 8 bits by its largest magnitude.

    Args:
        x: [M, K], any floating dtype; computed in float32.
        largest: the format's largest number.
        dtype: of the format; integers are rounded to nearest even.

    Returns:
        Numbers [M, K] in `dtype` and float32 scales [M, 1]. A row with NaN has scale NaN.
    """
    wide = aten.to.dtype(x, torch.float32)
    amax = aten.clamp_min.default(aten.amax.default(aten.abs.default(wide), [-1], True), SMALLEST)
    scaled = aten.mul.Tensor(wide, aten.mul.Tensor(aten.reciprocal.default(amax), largest))
    return _rounded(scaled, largest, dtype), aten.mul.Tensor(amax, 1 / largest)


def quantize_by(x: Any, amax: Any, largest: float, dtype: torch.dtype) -> tuple[Any, Any]:
    """Round to 8 bits by a magnitude that is known beforehand; what is larger is clipped.

    Args:
        x: [M, K], any floating dtype; computed in float32.
        amax: [1, 1] float32, positive.
        largest: the format's largest number.
        dtype: of the format.

    Returns:
        As `quantize_rows`; all scales are equal.
    """
    wide = aten.to.dtype(x, torch.float32)
    scaled = aten.mul.Tensor(wide, aten.mul.Tensor(aten.reciprocal.default(amax), largest))
    column = aten.zeros_like.default(aten.slice.Tensor(wide, 1, 0, 1))
    return _rounded(scaled, largest, dtype), aten.add.Tensor(
        column, aten.mul.Tensor(amax, 1 / largest)
    )


def _rounded(scaled: Any, largest: float, dtype: torch.dtype) -> Any:
    if not dtype.is_floating_point:
        scaled = aten.round.default(scaled)
    # Explicitly: out of range, older casts give NaN instead of the largest number.
    return aten.to.dtype(aten.clamp.default(scaled, -largest, largest), dtype)


@dataclass(frozen=True)
class RowFormat:
    """An 8-bit format of weights and activations.

    Attributes:
        name: as in a plan.
        dtype: of the numbers.
        largest: its largest number that is used.
    """

    name: str
    dtype: torch.dtype
    largest: float

    def parts(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what `encode` gives for a weight [N, K]."""
        return {"weight": ((n, k), self.dtype), "scale": ((1, n), torch.float32)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Numbers [N, K] and the output channels' scales [1, N]."""
        numbers, scale = quantize_rows(weight, self.largest, self.dtype)
        return {"weight": numbers, "scale": scale.t().contiguous()}

    def encode_again(self, decoded: Any, scale: Any) -> dict[str, Any]:
        """What `encode` gave for a weight [N, K] in float32 whose scales [1, N] were kept."""
        scaled = aten.mul.Tensor(decoded, aten.t.default(aten.reciprocal.default(scale)))
        return {"weight": _rounded(scaled, self.largest, self.dtype), "scale": scale}

    def multiply(
        self,
        x: Any,
        parts: Mapping[str, Any],
        bias: Any,
        out: torch.dtype,
        *,
        native: bool,
        rounded: tuple[Any, Any] | None = None,
    ) -> Any:
        """The layer's result [M, N] in dtype `out`.

        Args:
            x: [M, K], floating.
            parts: as `encode` gives them.
            bias: [N] or None.
            out: dtype of the result.
            native: by the device's 8-bit product; otherwise the same numbers in float32.
            rounded: numbers and scales of x, where they were made elsewhere.
        """
        numbers, scale = rounded or quantize_rows(x, self.largest, self.dtype)
        if native and self.dtype.is_floating_point:
            # cuBLASLt's rowwise product gives bf16.
            half = None if bias is None else _cast(bias, torch.bfloat16, out)
            operands = (numbers, aten.t.default(parts["weight"]), scale, parts["scale"], half)
            result = (None, torch.bfloat16, FAST_ACCUMULATION)
            return _cast(aten._scaled_mm.default(*operands, *result), out, torch.bfloat16)
        if native:
            total = aten._int_mm.default(numbers, aten.t.default(parts["weight"]))
        else:
            wide = (aten.to.dtype(t, torch.float32) for t in (numbers, parts["weight"]))
            left, right = wide
            total = aten.mm.default(left, aten.t.default(right))
        total = aten.to.dtype(total, torch.float32)
        y = aten.mul.Tensor(aten.mul.Tensor(total, parts["scale"]), scale)
        if bias is not None:
            y = aten.add.Tensor(y, aten.to.dtype(bias, torch.float32))
        return aten.to.dtype(y, out)

    def operator(self, *, native: bool) -> str:
        """What computes the product, for tables."""
        if not native:
            return "float32 product (simulated)"
        if self.dtype.is_floating_point:
            return f"_scaled_mm, {'fast' if FAST_ACCUMULATION else 'float32'} accumulation"
        return "_int_mm"


def _cast(x: Any, dtype: torch.dtype, current: torch.dtype) -> Any:
    return x if dtype == current else aten.to.dtype(x, dtype)


FP8_ROW = RowFormat("fp8_row", torch.float8_e4m3fn, 448.0)
INT8_ROW = RowFormat("int8_row", torch.int8, 127.0)
