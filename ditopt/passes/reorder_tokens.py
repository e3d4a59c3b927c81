"""Put the tokens of one attention into the plan's order, and its output back.

    sdpa(q, k, v)   =>   sdpa(q[:, :, p], k[:, :, p], v[:, :, p])[:, :, inverse of p]

Only where the whole block stack cannot run in order: there tokens, RoPE tables and masks are
permuted once outside the programs (`ditopt.stack_order` decides and says why not). The permutation
and its inverse are inputs, made from the sizes of each call.

Preconditions: queries and keys of one sequence, no mask, not causal. Error: none beyond the order
of summation in the softmax. Cost: four gathers of [B, H, N, D] for each attention (attention.md,
section 3.2).
"""

from __future__ import annotations

import torch
from torch import fx

from ditopt.graph import arguments, fake_value
from ditopt.passes.base import NodeDecision, PassContext, TokenPermutation, add_input
from ditopt.passes.select_sparse_pattern import reject
from ditopt.sites import SDPA, attention_operands

GATHER = torch.ops.aten.index_select.default
_TOKENS = 2  # their dimension in [B, H, N, D]


class ReorderTokens:
    """See the module."""

    name = "reorder_tokens"
    after: frozenset[str] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Wrap each attention that the plan wants in order and the stack does not give."""
        decisions = []
        for node in list(gm.graph.nodes):
            why = ctx.reordered.get(node.name)
            if why is None or node.op != "call_function" or node.target is not SDPA:
                continue
            if _is_wrapped(node):
                continue
            reason = _reject(node)
            if reason is None:
                _rewrite(gm, node)
            decisions.append(NodeDecision(node.name, reason is None, reason or why))
        return decisions


def _is_wrapped(node: fx.Node) -> bool:
    q = attention_operands(node)[0]
    return q.target is GATHER and isinstance(arguments(q)[2].meta.get("ditopt"), TokenPermutation)


def _reject(node: fx.Node) -> str | None:
    """Why an attention cannot be reordered, or None."""
    q, k, v, _, _ = attention_operands(node)
    shapes = [fake_value(x).shape for x in (q, k, v)]
    if len(shapes[0]) == 4 and shapes[0][_TOKENS] != shapes[1][_TOKENS]:
        return "queries and keys are different sequences"
    return reject(node, shapes[0][1])


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
    q, k, v, _, _ = attention_operands(node)
    length = fake_value(q).shape[_TOKENS]
    fake = fake_value(q).new_empty((length,), dtype=torch.int64)
    order, back = (
        add_input(gm, f"{node.name}_{name}", fake, TokenPermutation(node.name, inverse))
        for name, inverse in (("order", False), ("inverse", True))
    )
    with gm.graph.inserting_before(node):
        moved = [gm.graph.call_function(GATHER, (x, _TOKENS, order)) for x in (q, k, v)]
    node.args = (*moved, *node.args[3:])
    with gm.graph.inserting_after(node):
        restored = gm.graph.call_function(GATHER, (node, _TOKENS, back))
    node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    for created in (*moved, restored):
        created.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
