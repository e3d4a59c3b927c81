"""Which executor runs each block-sparse attention of a piece, before its graph is rewritten.

The choice is `kernels.block_sparse_attention.dispatch`'s, by measured cost; here are the sizes (the
hints of symbolic ones) and the densities that the plan's patterns have on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ditopt.graph import fake_value
from ditopt.kernels.block_sparse_attention import dispatch, ops  # noqa: F401  (registers it)
from ditopt.patterns import Clusters, HeadPattern, TwoMasks, density
from ditopt.site_inputs import BlockMeans, HeadChoice, ListChoice
from ditopt.sites import attention_operands
from ditopt.symbols import hint

if TYPE_CHECKING:
    from torch import fx

DENSE = dispatch.DENSE
"""Executors of attention without lists."""
UNKNOWN_DENSITY = 0.25
"""For selectors that keep as much as the data asks for."""

_WITHOUT_MEANS = ("gluon", "fa4", "flex")


def choose_executors(
    nodes: Iterable[fx.Node], choices: Mapping[str, ListChoice]
) -> dict[str, dispatch.Choice]:
    """By node name, for each attention node that has a choice of the plan."""
    chosen = {}
    for node in nodes:
        choice = choices.get(node.name)
        if choice is not None:
            chosen[node.name] = _choose(node, choice)
    return chosen


def _choose(node: fx.Node, choice: ListChoice) -> dispatch.Choice:
    operands = attention_operands(node)
    q, k = (fake_value(x) for x in operands[:2])
    declined = dispatch.reasons_to_decline(q, choice.block_q, choice.block_k)
    batch, heads, n_q, channels = (hint(size) for size in q.shape)
    n_k = hint(k.shape[2])
    blocks = (choice.block_q, choice.block_k)
    kept = _densities(choice, heads, n_q, n_k)
    if isinstance(choice.remainder, BlockMeans):
        declined |= dict.fromkeys(_WITHOUT_MEANS, "means of left-out blocks need ditopt's kernels")
    if not isinstance(choice, HeadChoice):
        declined["sdpa"] = "the lists come from the data"
    elif operands[3] is not None:
        declined["sdpa"] = "the attention has a mask"
    elif choice.remainder is not None and min(kept) < 1:
        declined["sdpa"] = "something stands for the blocks that are left out"
    elif choice.arithmetic is not None and min(kept) < 1:
        declined["sdpa"] = "8-bit products are of all heads in one launch"
    site = dispatch.Site(batch, n_q, n_k, channels, *blocks, kept)
    return dispatch.choose(site, device_name(q.device), declined)


def _densities(choice: ListChoice, heads: int, n_q: int, n_k: int) -> tuple[float, ...]:
    """Kept fraction of each head's blocks, as far as it is known before the call."""
    grid = tuple(hint(size) for size in choice.grid)
    layout = choice.geometry.layout((grid[0], grid[1], grid[2]), n_q)
    shape = (layout, n_q, n_k, choice.block_q, choice.block_k)

    def kept(pattern: HeadPattern) -> float:
        return density(pattern, *shape, choice.order)

    if isinstance(choice, HeadChoice):
        return tuple(kept(pattern) for pattern in choice.patterns)
    selector = choice.selector
    if isinstance(selector, TwoMasks):
        return (kept(selector.pattern),) * heads
    known = None if isinstance(selector, Clusters) else getattr(selector, "density", None)
    return (UNKNOWN_DENSITY if known is None else known,) * heads


def preferred(q: torch.Tensor, n_k: Any, block_q: int, block_k: int) -> str:
    """The executor for a call with such a ``q`` about whose lists nothing is known."""
    declined = dispatch.reasons_to_decline(q, block_q, block_k)
    batch, heads, n_q, channels = (hint(size) for size in q.shape)
    kept = (UNKNOWN_DENSITY,) * heads
    site = dispatch.Site(batch, n_q, hint(n_k), channels, block_q, block_k, kept)
    return dispatch.choose(site, device_name(q.device), declined).executor


def target_of(executor: str) -> Any:
    """What stands in a graph for an executor; None for the operator itself."""
    if executor == "flex":
        from ditopt.kernels.block_sparse_attention import flex

        return flex.block_sparse_attention
    if executor == "triton":
        from ditopt.kernels.block_sparse_attention import triton  # noqa: F401  (registers it)

        return torch.ops.ditopt.block_sparse_attention_triton.default
    if executor == "fa4":
        from ditopt.kernels.block_sparse_attention import fa4  # noqa: F401  (registers it)

        return torch.ops.ditopt.block_sparse_attention_fa4.default
    return None


def preferred_executor(q: torch.Tensor, n_k: int, block_q: int, block_k: int) -> Any:
    """The preferred executor as a function with the operator's signature, for timing it."""
    executor = preferred(q, n_k, block_q, block_k)
    target = target_of(executor) or torch.ops.ditopt.block_sparse_attention.default
    return torch.compile(target, dynamic=False) if executor == "flex" else target


def device_name(device: torch.device) -> str:
    """What costs are measured on: a GPU's name, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
