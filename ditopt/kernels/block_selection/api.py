"""The public function: checks its arguments by name and calls the selector operator.

Checks read shapes, dtypes and devices only: a call never waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators)
from .reference import RULES

Rule = Literal["top_k", "top_p", "threshold"]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    rule: Rule,
    amount: float,
    minimum: int = 1,
    forced: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The key blocks of every query block by their scores; see `reference` for scores and rules.

    Args:
        q: queries [B, H, N_q, D].
        k: keys [B, H, N_k, D], of q's dtype.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
        rule: `top_k`, `top_p` or `threshold`.
        amount: density in (0, 1], mass in (0, 1], or standard deviations above the mean.
        minimum: blocks that a row keeps at least.
        forced: bool [QB, KB], blocks that are always kept; None for none.
        lse: [B, H, N_q], natural log-sum-exp of the scores: selects by exact block mass (half the
            cost of dense attention); None selects by pooled scores.
        scale: of the scores; D ** -0.5 by default.

    Returns:
        counts int32 [B, H, QB] and ids int32 [B, H, QB, KB], ascending, 0 past the count.

    Raises:
        ValueError: starts with the argument's name.
    """
    _check(q, k, block_q, block_k, rule, amount, minimum)
    rows, width = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    if forced is None:
        forced = torch.zeros(rows, width, dtype=torch.bool, device=q.device)
    if forced.dtype != torch.bool or list(forced.shape) != [rows, width]:
        raise ValueError(
            f"forced: must be bool [query block, key block] = [{rows}, {width}], "
            f"got {forced.dtype} {list(forced.shape)}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale: must be finite, got {scale}")
    settings = (block_q, block_k, rule, float(amount), minimum, scale)
    if lse is None:
        lists = torch.ops.ditopt.select_blocks_pooled.default(q, k, forced, *settings)
    else:
        if list(lse.shape) != list(q.shape[:3]):
            raise ValueError(
                f"lse: must be [batch, head, query] = {list(q.shape[:3])}, got {list(lse.shape)}"
            )
        lists = torch.ops.ditopt.select_blocks_mass.default(q, k, lse, forced, *settings)
    counts, ids = lists
    return counts, ids


def _check(
    q: Tensor, k: Tensor, block_q: int, block_k: int, rule: str, amount: float, minimum: int
) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or x.shape[2] == 0:
            raise ValueError(
                f"{name}: must be [batch, head, token, channel] with tokens, got {list(x.shape)}"
            )
        if x.dtype not in _FLOATS or x.dtype != q.dtype:
            raise ValueError(f"{name}: must be floating point and of q's dtype, got {x.dtype}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: must have q's batch, heads and channels, got {list(k.shape)} for {list(q.shape)}"
        )
    for name, number in (("block_q", block_q), ("block_k", block_k), ("minimum", minimum)):
        if number < 1:
            raise ValueError(f"{name}: must be positive, got {number}")
    if rule not in RULES:
        raise ValueError(f"rule: must be one of {', '.join(RULES)}, got {rule!r}")
    if not math.isfinite(amount) or (rule != "threshold" and not 0 < amount <= 1):
        raise ValueError(f"amount: must lie in (0, 1] for top_k and top_p, got {amount}")
