"""``ditopt::quantize_rows``: schema, fake implementation, device dispatch.

CPU runs `reference`, CUDA runs `triton` (imported on the first launch) for rows that one program
can hold, and `reference` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

MOST_PARTS = 3
MOST_COLUMNS = 16384
"""Of one part, rounded up to a power of two: a program holds its row in registers."""

_NAME = "ditopt::quantize_rows"
torch.library.define(
    _NAME, "(Tensor[] parts, str[] activations, ScalarType dtype) -> (Tensor, Tensor)"
)
torch.library.impl(_NAME, "cpu")(reference.quantize_rows)


@torch.library.impl(_NAME, "cuda")
def _on_cuda(
    parts: Sequence[Tensor], activations: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not held(parts):
        return reference.quantize_rows(parts, activations, dtype)
    from . import triton  # Triton is imported on the first launch only

    return triton.quantize_rows(parts, activations, dtype)


def held(parts: Sequence[Tensor]) -> bool:
    """Whether one program can hold a row of these parts."""
    return (
        len(parts) <= MOST_PARTS
        and all(part.shape[1] <= MOST_COLUMNS and part.stride(1) == 1 for part in parts)
        and all(part.dtype != torch.float64 for part in parts)
    )


def _fake(
    parts: Sequence[Tensor], activations: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, columns = parts[0], sum(part.shape[1] for part in parts)
    return (
        first.new_empty((first.shape[0], columns), dtype=dtype),
        first.new_empty((first.shape[0], 1), dtype=torch.float32),
    )


torch.library.register_fake(_NAME, _fake)
