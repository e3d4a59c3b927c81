"""Rules that look at all rows of a head, or at all heads, before they choose.

The rules of `reference` choose row by row. Two published ones do not:

- ``adaptive`` (AdaSpa, arXiv 2502.21079): ``top_k`` with budgets by head. Heads whose best blocks
  hold more than 0.8 of the mass give half of their budget to as many heads that hold the least;
  the mean density stays.
- ``percentile`` (DraftAttention, arXiv 2505.14708): one threshold for a whole head on the softmax
  of its block scores, so that the share ``amount`` of all its blocks is kept. Rows may end up with
  few; ``minimum`` bounds how few.

Scores, lengths and forced blocks as in `reference.choose`. Plain PyTorch on the scores' device, no
wait for it. Formulas: attention.md A7 and 4.16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference

WHOLE_HEAD_RULES = ("adaptive", "percentile")
GOOD_RECALL = 0.8


def choose(
    scores: Tensor, lengths: Tensor, forced: Tensor, rule: str, amount: float, minimum: int
) -> Tensor:
    """The kept blocks, bool [B, H, QB, KB], by any rule of `reference` or of this file."""
    if rule in reference.RULES:
        return reference.choose(scores, lengths, forced, rule, amount, minimum)
    weighted = scores + lengths.to(scores.dtype).log()
    if rule == "adaptive":
        return _adaptive(weighted, forced, amount, minimum)
    if rule == "percentile":
        return _percentile(weighted, forced, amount, minimum)
    raise ValueError(f"rule: must be one of {', '.join(reference.RULES + WHOLE_HEAD_RULES)}")


def _ranks(weighted: Tensor, forced: Tensor) -> Tensor:
    """Place of each block in its row: forced ones, then by score, then by id."""
    ranked = torch.where(forced, math.inf, weighted)
    return ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def _adaptive(weighted: Tensor, forced: Tensor, density: float, minimum: int) -> Tensor:
    heads, blocks = weighted.shape[1], weighted.shape[-1]
    ranks, mass = _ranks(weighted, forced), weighted.exp()
    uniform = ranks < max(minimum, math.ceil(density * blocks))
    recall = torch.where(uniform, mass, 0.0).sum((2, 3)) / mass.sum((2, 3))
    good = (recall > GOOD_RECALL).sum(1, keepdim=True)
    moved = torch.minimum(good, heads - good)
    place = recall.argsort(dim=1, descending=True, stable=True).argsort(1)
    budget = torch.full_like(recall, density)
    budget = torch.where(place < moved, density / 2, budget)
    budget = torch.where(place >= heads - moved, min(1.0, 1.5 * density), budget)
    kept = (budget * blocks).ceil().clamp(min=minimum)
    return (ranks < kept[..., None, None]) | forced


def _percentile(weighted: Tensor, forced: Tensor, density: float, minimum: int) -> Tensor:
    share = torch.softmax(weighted, -1)
    rows, blocks = share.shape[-2:]
    ordered = share.flatten(2).sort(-1, descending=True).values
    last = ordered[..., math.ceil(density * rows * blocks) - 1, None, None]
    return (share >= last) | (_ranks(weighted, forced) < minimum) | forced
