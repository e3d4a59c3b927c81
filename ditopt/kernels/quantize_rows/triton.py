# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""Rounding rows to 8 bits in plain Triton: one program holds one row.

Each element is read once, activated once and written once, as one byte. The compiler's own kernel
for the same (a loop over the row for its largest magnitude, a second one to round) reads and
activates everything twice, and writes a concatenation before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, SMALLEST

_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


@triton.jit
def _part(ptr, row, stride, columns, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """A row's part behind its activation, float32; zero past the end."""
    at = tl.arange(0, BLOCK)
    x = tl.load(ptr + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 2:  # x (1 + tanh u) / 2 = x sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == 3:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _store(
    x, ptr, columns, inverse, BLOCK: tl.constexpr, LARGEST_: tl.constexpr, INT: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    y = tl.minimum(tl.maximum(x * inverse, -LARGEST_), LARGEST_)
    if INT:
        y = (y + 12582912.0) - 12582912.0  # to the nearest integer, halves to even
    tl.store(ptr + at, y.to(ptr.dtype.element_ty), mask=at < columns)


@triton.jit
def _larger(a, b):
    """The larger one, or NaN: `tl.max` may pass over NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x):
    return tl.reduce(tl.abs(x), 0, _larger)


@triton.jit
def _quantize(
    p0, p1, p2, out_ptr, scale_ptr, stride0, stride1, stride2, k0, k1, k2,
    PARTS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
    LARGEST_: tl.constexpr, SMALLEST_: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x0 = _part(p0, row, stride0, k0, B0, A0)
    amax = _largest(x0)
    if PARTS > 1:
        x1 = _part(p1, row, stride1, k1, B1, A1)
        amax = _larger(amax, _largest(x1))
    if PARTS > 2:
        x2 = _part(p2, row, stride2, k2, B2, A2)
        amax = _larger(amax, _largest(x2))
    amax = tl.where(amax < SMALLEST_, SMALLEST_, amax)
    inverse = 1.0 / amax * LARGEST_
    start = out_ptr + row * (k0 + k1 + k2)
    _store(x0, start, k0, inverse, B0, LARGEST_, INT)
    if PARTS > 1:
        _store(x1, start + k0, k1, inverse, B1, LARGEST_, INT)
    if PARTS > 2:
        _store(x2, start + k0 + k1, k2, inverse, B2, LARGEST_, INT)
    tl.store(scale_ptr + row, amax * (1.0 / LARGEST_))


def quantize_rows(
    parts: Sequence[Tensor], activations: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_rows`, for parts that `ops.held` accepts."""
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    numbers = torch.empty(shape, dtype=dtype, device=parts[0].device)
    scale = torch.empty((shape[0], 1), dtype=torch.float32, device=parts[0].device)
    launch(parts, activations, numbers, scale, LARGEST[dtype])
    return numbers, scale


def launch(
    parts: Sequence[Tensor],
    activations: Sequence[str],
    numbers: Tensor,
    scale: Tensor,
    largest: float,
) -> None:
    """Fill `numbers` [M, K] and `scale` [M, 1]; a cast to the dtype of `numbers` rounds."""
    if numbers.shape[0] == 0:
        return
    tiles = _tiles(parts, activations)
    numbers_of_a_warp = 2048 if len(parts) == 1 else 1024  # tuned on one H200
    spare = 3 - len(tiles)
    columns = [tile.shape[1] for tile, _ in tiles]
    blocks = [triton.next_power_of_2(k) for k in columns]
    _quantize[(numbers.shape[0],)](
        *(tile for tile, _ in tiles), *[parts[0]] * spare, numbers, scale,
        *(tile.stride(0) for tile, _ in tiles), *[0] * spare,
        *columns, *[0] * spare,
        len(tiles), *blocks, *[1] * spare,
        *(_ACTIVATIONS[name] for _, name in tiles), *[0] * spare,
        largest, SMALLEST, not numbers.dtype.is_floating_point,
        num_warps=min(16, max(1, triton.next_power_of_2(sum(blocks)) // numbers_of_a_warp)),
    )  # fmt: skip


def _tiles(parts: Sequence[Tensor], activations: Sequence[str]) -> list[tuple[Tensor, str]]:
    """The parts; one that stands alone is cut in two where that wastes fewer lanes.

    A tile is as wide as a power of two: 8,960 columns alone would take 16,384 lanes, cut after
    8,192 they take 9,216 (465 us against 302 us for 32,760 rows on one H200). Of several parts,
    cutting made FLUX' [3,072 + 12,288] slower: 113 us against 101.
    """
    if len(parts) == 1:
        (part,), (name,) = parts, activations
        half = triton.next_power_of_2(part.shape[1]) // 2
        rest = part.shape[1] - half
        if triton.next_power_of_2(rest) < half:
            return [(tile, name) for tile in part.split([half, rest], dim=1)]
    return list(zip(parts, activations, strict=True))
