"""What is kept of a head's exact block mass: a picture, a recall curve, a block set, a rank.

All of it follows from the mass [H, QB, KB] that `candidate_errors` gives; nothing here is larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of the attention for which the kept density is recorded."""

TOP_RECALL = 0.9
"""Share that the recorded block sets hold."""

PICTURE = 64
"""Largest number of rows and of columns of a recorded map."""

_SET = 256
"""The same of a block set: finer ones, of long sequences, are merged to that."""

_ENERGY = 0.99


@dataclass(frozen=True)
class HeadMaps:
    """One attention of one call, on the CPU.

    Attributes:
        mass: float16 [H, r, c] share of each (merged) key block, rows sum to 1; r, c <= 64.
        recall: float32 [H, R] least density that holds each of `RECALL_LEVELS`.
        top: uint8 [H, bytes] the smallest set of blocks that holds 0.9, packed as `pack` does.
        rank: float32 [H] effective rank of the rest: how many singular values of the picture
            without the top blocks hold 99% of its energy. Averages over blocks only lose rank, so
            a linear branch for the rest needs at least as many features.
    """

    mass: Tensor
    recall: Tensor
    top: Tensor
    rank: Tensor

    @classmethod
    def of(cls, mass: Tensor) -> HeadMaps:
        """From mass [H, QB, KB] with rows that sum to 1."""
        picture, merged = merge(mass, PICTURE), merge(mass, _SET)
        rest = merge(mass.masked_fill(top_blocks(mass, TOP_RECALL), 0.0), PICTURE)
        return cls(
            mass=picture.half(),
            recall=recall_curve(mass),
            top=pack(top_blocks(merged, TOP_RECALL)),
            rank=effective_rank(rest),
        )


def merge(mass: Tensor, most: int) -> Tensor:
    """[H, QB, KB] with neighbouring blocks merged to at most `most` rows and columns.

    Rows become means of rows (the last of fewer), columns sums of columns: rows still sum to 1.
    """
    rows, columns = (-(-size // most) for size in mass.shape[1:])
    if rows == columns == 1:
        return mass
    padded = F.pad(mass, (0, -mass.shape[2] % columns, 0, -mass.shape[1] % rows))
    heads, tall, wide = padded.shape
    summed = padded.view(heads, tall // rows, rows, wide // columns, columns).sum(dim=(2, 4))
    counts = torch.full((summed.shape[1],), float(rows))
    counts[-1] = mass.shape[1] - (summed.shape[1] - 1) * rows
    means: Tensor = summed / counts[:, None]
    return means


def top_blocks(mass: Tensor, share: float) -> Tensor:
    """The fewest blocks of each head that hold `share` of its attention, bool [H, QB, KB]."""
    order, needed = _needed(mass, (share,))
    first = torch.arange(order.shape[1]) < needed
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, first).view(mass.shape)


def recall_curve(mass: Tensor, levels: tuple[float, ...] = RECALL_LEVELS) -> Tensor:
    """Density that holds each level of the attention, float32 [H, R]."""
    order, needed = _needed(mass, levels)
    return (needed / order.shape[1]).float()


def _needed(mass: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Blocks by mass, descending, int64 [H, QB * KB], and how many hold each level, [H, R]."""
    values, order = mass.double().flatten(1).sort(dim=1, descending=True, stable=True)
    cumulative = values.cumsum(1)
    wanted = cumulative[:, -1:] * torch.tensor(levels, dtype=torch.float64)
    needed = torch.searchsorted(cumulative, wanted) + 1
    return order, needed.clamp(max=order.shape[1])


def effective_rank(rest: Tensor) -> Tensor:
    """Singular values of [H, r, c] that hold 99% of the energy, float32 [H]; 0 where it is zero."""
    energy = torch.linalg.svdvals(rest.double()).square().cumsum(1)
    total = energy[:, -1:]
    needed = (energy < _ENERGY * total).sum(1) + 1
    return torch.where(total[:, 0] > 0, needed, 0).float()


def pack(blocks: Tensor) -> Tensor:
    """Bool [..., QB, KB] as uint8 [..., ceil(QB * KB / 8)], the lowest bit first."""
    bits = blocks.flatten(-2).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[-1] % 8))
    octets = bits.view(*bits.shape[:-1], -1, 8) << torch.arange(8, dtype=torch.uint8)
    return octets.sum(-1, dtype=torch.uint8)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Shared over joint blocks of packed sets [..., bytes], float64 [...]; 1 for two empty ones."""
    both, either = (_count(x) for x in (a & b, a | b))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).double()


def _count(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).sum(dim=(-1, -2), dtype=torch.int64)
