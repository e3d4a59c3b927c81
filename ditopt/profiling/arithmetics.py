"""Dense attention in 8-bit products: its output error at a site, its time, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch

from ditopt.kernels.block_sparse_attention import ops_8bit, reference_8bit
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.profiling.candidates import SCRATCH_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.plan import Block
    from ditopt.profiling.schema import Costs

ARITHMETICS: tuple[reference_8bit.Arithmetic, ...] = get_args(reference_8bit.Arithmetic)
"""All of them, in the order of a profile's tensors."""

NOT_OFFERED = "8-bit attention is not offered: "
"""How notes about missing times begin."""

_QUERIES = 256
"""Of a head: rounding errs alike at all of them, and so many cost a third of one pass over the
patterns of 2,048 tokens."""


@torch.no_grad()
def arithmetic_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_k: int,
    scale: float,
    scratch_bytes: int = SCRATCH_BYTES,
    queries: int = _QUERIES,
) -> Tensor:
    """Output error of each arithmetic against dense attention, every block kept.

    Args:
        q: [B, H, N_q, D], any floating dtype; computed in float32.
        k: [B, H, N_k, D].
        v: [B, H, N_k, D].
        block_k: key tokens of a block, which share a scale.
        scale: factor of the scores.
        scratch_bytes: memory for scores; those of one query of a head are always taken.
        queries: how many, evenly spread, stand for all.

    Returns:
        [H, A] ``|o_arithmetic - o_dense|^2`` summed over batch, queries and channels, float64 on
        the CPU. Cost: three dense attentions of so many queries.
    """
    n_q, heads = q.shape[2], q.shape[1]
    spread = torch.linspace(0, n_q - 1, min(queries, n_q), dtype=torch.float64).round().long()
    q = q[:, :, spread.to(q.device)]
    step = max(1, scratch_bytes // (16 * q.shape[0] * k.shape[2]))
    error = q.new_zeros(heads, len(ARITHMETICS), dtype=torch.float64)
    for head in range(heads):
        one = slice(head, head + 1)
        exact = [x[:, one].float() for x in (q, k, v)]
        rounded = reference_8bit.quantize(exact[0], exact[1], exact[2], block_k, values=True)
        q8, k8, v8 = (x.float() for x in rounded)
        for first in range(0, len(spread), step):
            rows = slice(first, first + step)
            dense = (exact[0][:, :, rows] @ exact[1].mT * scale).softmax(-1) @ exact[2]
            scores = q8[:, :, rows] @ k8.mT * scale
            for number, kind in enumerate(ARITHMETICS):
                values = kind != "int8_qk"
                out = reference_8bit.attend(scores, v8 if values else exact[2], values=values)
                error[head, number] += (out - dense).double().square().sum()
    return (error * (n_q / len(spread))).cpu()


def arithmetic_runs(q: Tensor, k: Tensor, v: Tensor, block: Block) -> dict[str, Callable[[], Any]]:
    """Each arithmetic on dense attention, to be timed; none where no kernel takes the call."""
    if ops_8bit.reason_to_decline(q, block.q, block.k) is not None:
        return {}
    sizes = (-(-q.shape[2] // block.q), -(-k.shape[2] // block.k))
    lists = from_blocks(torch.ones(1, 1, *sizes, dtype=torch.bool, device=q.device))
    return {
        kind: partial(
            ops_8bit.block_sparse_attention_8bit,
            *(q, k, v, *lists),
            block_q=block.q,
            block_k=block.k,
            arithmetic=kind,
        )
        for kind in ARITHMETICS
    }


def what_is_left_out(costs: Costs, block: Block, device: torch.device) -> tuple[str, ...]:
    """Why shapes have no time of 8-bit attention, so that the search does not offer it there."""
    reasons = []
    for cost in costs.attention:
        if cost.arithmetic_ms:
            continue
        if costs.source == "roofline":
            reasons.append("peak rates do not tell its time")
            continue
        dtype, channels = getattr(torch, cost.shape.dtype), cost.shape.head_dim
        q = torch.empty(1, 1, 1, channels, dtype=dtype, device=device)
        reason = ops_8bit.reason_to_decline(q, block.q, block.k)
        reasons.append(reason or "its time was not measured")
    return tuple(NOT_OFFERED + reason for reason in dict.fromkeys(reasons))
