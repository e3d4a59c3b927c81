"""What is done to a layer's input before it is rounded, and exactly undone in weight and bias.

    W x + b  =  W (x - mu) + (b + W mu)             centre
             =  (W diag(s)) (x / s) + b             balance
             =  (W diag(s) R) (R^T x / s) + b       rotate
             =  (W diag(s) R P R) (R^T P^T R^T x / s) + b       rotate_twice

Centring takes the constant part out of modulated norms' outputs, the one transform that helps fp8.
Balance (SmoothQuant, arXiv 2211.10438; ViDiT-Q, arXiv 2406.02540) moves large channels into the
weight, which int8 needs. Rotation by a regular Hadamard matrix (ConvRot, arXiv 2512.03673) spreads
what is left; all its row sums are 1, so that a constant input is not gathered in one channel.
Blocks that stay larger than others are dealt out to all of them by P and mixed once more (the dual
transform of LRQ-DiT, arXiv 2508.03485, and DuQuant, with that matrix in place of a greedy search).
Subtraction and division by vectors fuse into the kernel that rounds; rotation does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_EXPONENT = 0.5
_LIMIT = 1e4
_BLOCKS = (64, 16, 4)

NEEDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "centre": ("mean",),
    "balance": ("amax",),
    "rotate": ("amax",),
    "rotate_twice": ("amax",),
}
"""Statistics of a layer's input channels [K] that each transform wants from the plan."""


def balance_scales(amax: Tensor, weight: Tensor) -> Tensor:
    """Scales s [K] that even out an input and a weight: ``sqrt(max|x_c| / max_o|W_oc|)``.

    Args:
        amax: [K] largest magnitude of each input channel.
        weight: [N, K].

    Returns:
        Scales in `weight`'s dtype, 1 for channels where either side is zero; their geometric mean
        is 1, which leaves the range of both sides alone.
    """
    columns = weight.abs().amax(dim=0)
    x = amax.to(weight)
    scales = x.pow(_EXPONENT) / columns.pow(1 - _EXPONENT)
    scales = torch.where((x > 0) & (columns > 0), scales, torch.ones_like(scales))
    scales = scales / scales.log().mean().exp()
    return scales.clamp(1 / _LIMIT, _LIMIT)


def rotation_block(k: int) -> int | None:
    """Channels that are rotated together: the largest block that divides K, or None."""
    return next((block for block in _BLOCKS if k % block == 0), None)


@lru_cache
def regular_hadamard(size: int) -> Tensor:
    """Symmetric orthogonal [size, size], float64, whose rows all sum to 1; size is a power of 4."""
    base = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, base / 2)
    if matrix.shape[0] != size:
        raise ValueError(f"expected a power of 4, got {size}")
    return matrix


_OPERANDS = {
    "none": (),
    "centre": ("mean",),
    "balance": ("stretch",),
    "rotate": ("stretch", "rotation"),
    "rotate_twice": ("stretch", "rotation", "order"),
}


def parts(
    transform: str, k: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the operands that `apply` reads, where it computes in `dtype`."""
    block = rotation_block(k) or 0
    known = {
        "mean": ((k,), dtype),
        "stretch": ((k,), dtype),
        "rotation": ((block, block), dtype),
        "order": ((k,), torch.int64),
    }
    return {name: known[name] for name in _OPERANDS[transform]}


def zigzag(peaks: Tensor, block: int) -> Tensor:
    """Order [K] that deals channels out to blocks, largest first, back and forth.

    Args:
        peaks: [K] size of each channel.
        block: channels of a block; divides K.
    """
    ranked = peaks.argsort(descending=True, stable=True).reshape(block, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().reshape(-1)


def apply(x: Any, transform: str, operands: Mapping[str, Any], k: int) -> Any:
    """The transformed input [M, K].

    Args:
        x: [M, K], in the dtype to compute in; a tensor or an `fx.Proxy`.
        transform: its name.
        operands: what `fold` gave for it.
        k: K.
    """
    if transform == "centre":
        return aten.sub.Tensor(x, operands["mean"])
    if transform != "none":
        x = aten.mul.Tensor(x, operands["stretch"])
    if transform.startswith("rotate"):
        x = _rotate(x, operands["rotation"], k)
    if transform == "rotate_twice":
        x = _rotate(aten.index_select.default(x, 1, operands["order"]), operands["rotation"], k)
    return x


def _rotate(x: Any, rotation: Any, k: int) -> Any:
    blocks = aten.reshape.default(x, [-1, rotation_block(k)])
    return aten.reshape.default(aten.mm.default(blocks, rotation), [-1, k])


def fold(
    transform: str, weight: Tensor, bias: Tensor | None, statistics: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Weight and bias for the transformed input, and the operands that transform it.

    Args:
        transform: its name.
        weight: [N, K], in the dtype to compute in.
        bias: [N] or None.
        statistics: of the input channels, as `NEEDS` says.

    Returns:
        Weight [N, K], bias [N] or None, operands by name.
    """
    if transform == "none":
        return weight, bias, {}
    if transform == "centre":
        mean = statistics["mean"].to(weight)
        moved = weight @ mean
        return weight, moved if bias is None else bias.to(weight) + moved, {"mean": mean}
    scales = balance_scales(statistics["amax"], weight)
    weight = weight * scales
    operands = {"stretch": 1 / scales}
    k = weight.shape[1]
    if transform.startswith("rotate"):
        operands["rotation"] = rotation = regular_hadamard(rotation_block(k) or 0).to(weight)
        weight = _rotate(weight, rotation, k)
    if transform == "rotate_twice":
        # Mixed channels of one block are alike: of the root mean square of its balanced peaks.
        peaks = (statistics["amax"].to(weight) / scales).reshape(-1, len(rotation))
        spread = peaks.square().mean(1, keepdim=True).expand_as(peaks).reshape(-1)
        operands["order"] = order = zigzag(spread, len(rotation))
        weight = _rotate(weight[:, order], rotation, k)
    return weight, bias, operands
