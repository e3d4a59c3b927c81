"""Let each head of an attention choose, from the data, in which order its tokens form blocks.

    sdpa(q, k, v)   =>   put(block_sparse(take(q, o), take(k, p), take(v, p), lists), o)

with orders o, p [B, H, N] and lists from `cluster_tokens` (similar tokens side by side, SVG2) or
from `vote_order` (frame by frame or place by place, o = p, Sparse VideoGen). What the lists leave
out is dropped; the orders themselves change nothing.

Preconditions: as for `select_sparse_pattern`; queries and keys of one sequence; clusters take no
text. Error: not predicted; it follows the data. Cost: four gathers of [B, H, N, D] beside the
choice. Papers: arXiv 2505.18875, arXiv 2502.01776.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ditopt.graph import fake_value
from ditopt.kernels.block_selection import ops_orders as _orders  # noqa: F401  (registers them)
from ditopt.passes.base import (
    EXECUTOR,
    LAUNCH_OF,
    ClusterChoice,
    ForcedBlocks,
    NodeDecision,
    PassContext,
    PlaceOrder,
    VoteChoice,
    add_input,
    add_slot,
)
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, reject
from ditopt.sites import SDPA, attention_operands
from ditopt.symbols import hint

CLUSTER = torch.ops.ditopt.cluster_tokens.default
VOTE = torch.ops.ditopt.vote_order.default
TAKE, PUT = torch.ops.ditopt.take_tokens.default, torch.ops.ditopt.put_tokens.default


class SelectHeadOrders:
    """See the module."""

    name = "select_head_orders"
    after = frozenset({"fuse_projections", "reorder_tokens"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite each attention for which the plan names such a selector."""
        decisions = []
        for node in list(gm.graph.nodes):
            choice = ctx.orders.get(node.name)
            if choice is None or node.op != "call_function" or node.target is not SDPA:
                continue
            reason = _reject(node, choice)
            if reason is None:
                _rewrite(gm, node, choice)
            decisions.append(NodeDecision(node.name, reason is None, reason or _text(choice)))
        return decisions


def _text(choice: ClusterChoice | VoteChoice) -> str:
    if isinstance(choice, VoteChoice):
        return (
            f"{choice.samples} queries of each head choose between one pattern frame by frame and "
            "place by place, at every call"
        )
    queries, keys = choice.clusters
    return (
        f"tokens sorted into {queries} clusters of queries and {keys} of keys in each head, "
        f"{choice.mass:g} of the mass over clusters kept, at every call"
    )


def _reject(node: fx.Node, choice: ClusterChoice | VoteChoice) -> str | None:
    """Why heads cannot choose their order, or None."""
    reason = reject(node, choice.heads)
    if reason is not None:
        return reason
    q, k, _, _, _ = attention_operands(node)
    if fake_value(q).shape[2] != fake_value(k).shape[2]:
        return "queries and keys are different sequences"
    if isinstance(choice, ClusterChoice) and hint(choice.text):
        return f"{hint(choice.text)} tokens of its sequence are text, which must always be kept"
    return None


def _rewrite(gm: fx.GraphModule, node: fx.Node, choice: ClusterChoice | VoteChoice) -> None:
    q, k, v, _, scale = attention_operands(node)
    fake = fake_value(q)
    scale = scale if scale is not None else 1.0 / math.sqrt(fake.shape[-1])
    blocks = (choice.block_q, choice.block_k)
    arguments: tuple[Any, ...]
    if isinstance(choice, ClusterChoice):
        slot = add_slot(gm, node.name, fake)
        settings = (*choice.clusters, *choice.iterations, choice.mass, choice.least, scale)
        target, arguments = CLUSTER, (q, k, slot, *blocks, *settings)
    else:
        shape = (-(-choice.tokens_q // choice.block_q), -(-choice.tokens_k // choice.block_k))
        mask = fake.new_empty(shape, dtype=torch.bool)
        keep = add_input(gm, f"{node.name}_keep", mask, ForcedBlocks(node.name))
        length = fake.new_empty((fake.shape[2],), dtype=torch.int64)
        order = add_input(gm, f"{node.name}_places", length, PlaceOrder(node.name))
        target, arguments = VOTE, (q, k, v, keep, order, *blocks, choice.samples, scale)
    with gm.graph.inserting_before(node):
        chosen = gm.graph.call_function(target, arguments)
        count = 4 if target is CLUSTER else 3
        items = [gm.graph.call_function(operator.getitem, (chosen, i)) for i in range(count)]
        q_order, k_order, counts, ids = items if count == 4 else (items[0], *items)
        moved = [
            gm.graph.call_function(TAKE, (x, order))
            for x, order in ((q, q_order), (k, k_order), (v, k_order))
        ]
        sparse = gm.graph.call_function(BLOCK_SPARSE, (*moved, counts, ids, *blocks, scale))
        out = gm.graph.call_function(PUT, (sparse, q_order))
    stack = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
    for created in (chosen, *items, *moved, sparse, out):
        created.meta = dict(stack)
    sparse.meta |= {EXECUTOR: choice.executor, LAUNCH_OF: node.name}
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
