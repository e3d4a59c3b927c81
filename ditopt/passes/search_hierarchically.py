"""Let an attention over a long sequence search its blocks from coarse to fine, as the plan says.

    sdpa(q, k, v)   =>   hierarchical_attention(q, k, v)

Cost N log N. Preconditions: no mask, not causal, one sequence of grid tokens without text, of a
fixed length (it decides the number of levels). Error: not predicted; the method is made for models
that are trained with it. Paper: LLSA (arXiv 2512.16615).
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ditopt.graph import fake_value
from ditopt.kernels.hierarchical_attention import ops as _ops  # noqa: F401  (registers operators)
from ditopt.kernels.hierarchical_attention.reference import levels
from ditopt.passes.base import HierarchicalChoice, NodeDecision, PassContext
from ditopt.passes.select_sparse_pattern import reject
from ditopt.sites import SDPA, attention_operands
from ditopt.symbols import hint, is_symbolic

HIERARCHICAL = torch.ops.ditopt.hierarchical_attention.default
BLOCK = 16


class SearchHierarchically:
    """See the module."""

    name = "search_hierarchically"
    after = frozenset({"fuse_projections", "reorder_tokens"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite each attention for which the plan names the search."""
        decisions = []
        for node in list(gm.graph.nodes):
            choice = ctx.hierarchical.get(node.name)
            if choice is None or node.op != "call_function" or node.target is not SDPA:
                continue
            reason = _reject(node, choice)
            if reason is None:
                depth = _rewrite(gm, node, choice)
                reason, applied = f"best {choice.top_k} blocks at each of {depth} levels", True
            else:
                applied = False
            decisions.append(NodeDecision(node.name, applied, reason))
        return decisions


def _reject(node: fx.Node, choice: HierarchicalChoice) -> str | None:
    """Why an attention cannot search its blocks, or None."""
    reason = reject(node, choice.heads)
    if reason is not None:
        return reason
    if is_symbolic(choice.tokens):
        return "the graph serves several lengths, and the levels depend on it"
    if hint(choice.text):
        return f"{hint(choice.text)} tokens of its sequence are text, which must always be kept"
    q, k, _, _, _ = attention_operands(node)
    if fake_value(q).shape[2] != fake_value(k).shape[2]:
        return "queries and keys are different sequences"
    return None


def _rewrite(gm: fx.GraphModule, node: fx.Node, choice: HierarchicalChoice) -> int:
    q, k, v, _, scale = attention_operands(node)
    scale = scale if scale is not None else 1.0 / math.sqrt(fake_value(q).shape[-1])
    depth = levels(hint(choice.tokens), BLOCK)
    with gm.graph.inserting_before(node):
        out = gm.graph.call_function(
            HIERARCHICAL, (q, k, v, BLOCK, choice.top_k, depth, choice.coarse, scale)
        )
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
    return depth
