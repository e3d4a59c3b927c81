"""Rounding rows to 8 bits behind an activation, in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-12
"""Floor of a row's largest magnitude."""

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `none`, `gelu`, `gelu_tanh`, `silu`."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "silu" else x


def quantize_rows(
    parts: Sequence[Tensor], activations: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows, side by side from several parts, each behind its activation, rounded.

    Args:
        parts: [M, K_i] each, floating; computed in float32.
        activations: one for each part.
        dtype: float8_e4m3fn or int8.

    Returns:
        Numbers [M, sum K_i] and float32 scales [M, 1]: the row's largest magnitude over the
        format's. A row with NaN has scale NaN.
    """
    pairs = zip(parts, activations, strict=True)
    x = torch.cat([activate(part.float(), activation) for part, activation in pairs], dim=1)
    largest = LARGEST[dtype]
    amax = x.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    scaled = x * (amax.reciprocal() * largest)
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), amax * (1 / largest)
