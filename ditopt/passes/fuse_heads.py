"""All heads of an attention in one launch, whatever their patterns and densities.

    cat_h block_sparse(q[:, h], ..., lists[:, h])   =>   block_sparse(q, ..., lists)

Preconditions: the calls read consecutive heads of the same tensors with the same block sizes.
Error: none; each head's arithmetic is the same. Benefit: one launch that fills the chip instead of
H that do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ditopt.graph import arguments, erase_unused, fake_value
from ditopt.kernels.block_sparse_attention import ops  # noqa: F401  (registers the operator)
from ditopt.passes.base import NodeDecision, PassContext

aten = torch.ops.aten
BLOCK_SPARSE = torch.ops.ditopt.block_sparse_attention.default
_TENSORS = 5  # q, k, v and the two block lists; block sizes and scale follow


class FuseHeads:
    """See the module."""

    name = "fuse_heads"
    after = frozenset({"select_sparse_pattern"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Merge the per-head calls behind each concatenation."""
        decisions = []
        for node in list(gm.graph.nodes):
            calls = _match(node)
            if not calls:
                continue
            name, reason = node.name, _reject(calls)
            if reason is None:
                _rewrite(gm, node, calls)
            text = reason or f"{len(calls)} heads in one launch"
            decisions.append(NodeDecision(name, reason is None, text))
        return decisions


def _match(node: fx.Node) -> list[fx.Node]:
    """The block-sparse calls that a concatenation joins; empty where it joins anything else."""
    if node.op != "call_function" or node.target is not aten.cat.default:
        return []
    calls: list[fx.Node] = arguments(node)[0]
    matches = all(call.op == "call_function" and call.target is BLOCK_SPARSE for call in calls)
    return calls if matches else []


def _sources(call: fx.Node, head: int) -> tuple[Any, ...] | None:
    """The call's arguments with all heads, if it takes exactly `head` of each tensor."""
    args = arguments(call)
    parts = args[:_TENSORS]
    for part in parts:
        if part.target is not aten.slice.Tensor or arguments(part)[1:] != (1, head, head + 1):
            return None
    return (*(arguments(part)[0] for part in parts), *args[_TENSORS:])


def _reject(calls: list[fx.Node]) -> str | None:
    """Why the calls cannot be one, or None."""
    first = _sources(calls[0], 0)
    for head, call in enumerate(calls):
        sources = _sources(call, head)
        if first is None or sources is None:
            return "the calls do not read consecutive heads"
        if sources != first:
            return "the calls read different tensors or block sizes"
    if first is None or fake_value(first[0]).shape[1] != len(calls):
        return "the calls do not cover all heads"
    return None


def _rewrite(gm: fx.GraphModule, joined: fx.Node, calls: list[fx.Node]) -> None:
    parts = [part for call in calls for part in arguments(call)[:_TENSORS]]
    with gm.graph.inserting_before(joined):
        fused = gm.graph.call_function(BLOCK_SPARSE, _sources(calls[0], 0))
    fused.meta = dict(joined.meta)
    joined.replace_all_uses_with(fused)
    gm.graph.erase_node(joined)
    erase_unused(gm.graph, calls)
    erase_unused(gm.graph, dict.fromkeys(parts))
