"""All heads of an attention in one launch, whatever their patterns and densities.

    cat_h block_sparse(q[:, h], ..., lists[:, h])   =>   block_sparse(q, ..., lists)

Preconditions: the calls read consecutive heads of the same tensors with the same block sizes. Error: none; each head's arithmetic
is the same. Benefit: one launch that fills the chip instead of H that do not.
"""

from __future__ import annotations

import torch
from torch import fx

from ditopt.graph import erase_unused, fake_value
from ditopt.passes.base import NodeDecision, PassContext

aten = torch.ops.aten


class FuseHeads:
    """See the module."""

    name = "fuse_heads"
    after = frozenset({"select_sparse_pattern"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Merge the per-head calls behind each concatenation."""
        decisions = []
        op = torch.ops.ditopt.block_sparse_attention.default
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not aten.cat.default:
                continue
            calls = node.args[0]
            if not calls or any(
                call.op != "call_function" or call.target is not op for call in calls
            ):
                continue
            name, reason = node.name, _reject(calls)
            if reason is None:
                _rewrite(gm, node, calls)
            decisions.append(
                NodeDecision(name, reason is None, reason or f"{len(calls)} heads in one launch")
            )
        return decisions


def _reject(calls: list[fx.Node]) -> str | None:
    """Why the calls cannot be one, or None."""
    sources = None
    for head, call in enumerate(calls):
        parts = call.args[:5]
        if any(
            part.target is not aten.slice.Tensor or tuple(part.args[1:]) != (1, head, head + 1)
            for part in parts
        ):
            return "the calls do not read consecutive heads"
        these = (*(part.args[0] for part in parts), *call.args[5:])
        if sources not in (None, these):
            return "the calls read different tensors or block sizes"
        sources = these
    q = calls[0].args[0].args[0]
    if fake_value(q).shape[1] != len(calls):
        return "the calls do not cover all heads"
    return None


def _rewrite(gm: fx.GraphModule, joined: fx.Node, calls: list[fx.Node]) -> None:
    parts = [part for call in calls for part in call.args[:5]]
    arguments = (*(part.args[0] for part in calls[0].args[:5]), *calls[0].args[5:])
    with gm.graph.inserting_before(joined):
        fused = gm.graph.call_function(torch.ops.ditopt.block_sparse_attention.default, arguments)
    fused.meta = dict(joined.meta)
    joined.replace_all_uses_with(fused)
    gm.graph.erase_node(joined)
    erase_unused(gm.graph, calls)
    erase_unused(gm.graph, dict.fromkeys(parts))
