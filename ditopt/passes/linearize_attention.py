"""Add linear attention over the blocks that a sparse attention leaves out (SLA).

    block_sparse(q, k, v, lists)
        =>   block_sparse(q, k, v, lists) + linear_remainder(q, k, v, lists) W^T

W, one D x D matrix for each head, comes from the plan's side file: it is trained with the model,
and without training nothing is claimed for it (with W = 0 the pass changes nothing). Paper: SLA
(arXiv 2509.24006).

Preconditions: one block-sparse launch for all heads at the site, made by `select_sparse_pattern`
and `fuse_heads` or by `select_blocks_online`. Error: what training leaves. Cost: 4 N D^2 and the
sums over blocks (`kernels.linear_attention`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ditopt.graph import arguments, fake_value
from ditopt.kernels.linear_attention import ops as _linear  # noqa: F401  (registers the operator)
from ditopt.passes.base import (
    LAUNCH_OF,
    BlockLists,
    ForcedBlocks,
    NodeDecision,
    PassContext,
    RemainderChoice,
    RemainderProjection,
    add_input,
)
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE

aten = torch.ops.aten
REMAINDER = torch.ops.ditopt.linear_remainder.default
_ARGUMENTS = 7  # q, k, v, counts, ids and the block sizes; the scale follows


class LinearizeAttention:
    """See the module."""

    name = "linearize_attention"
    after = frozenset(
        {"select_sparse_pattern", "fuse_heads", "select_blocks_online", "select_head_orders"}
    )

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Add the linear part at each site for which the plan holds a projection."""
        launches = {
            site_of(node): node
            for node in gm.graph.nodes
            if node.op == "call_function" and node.target is BLOCK_SPARSE
        }
        decisions = []
        for site, choice in ctx.remainders.items():
            node = launches.get(site)
            if node is not None and _has_remainder(node):
                continue
            reason = _reject(node, choice)
            if reason is None and node is not None:
                _rewrite(gm, node, site, choice)
            text = reason or f"linear attention of {choice.phi} features on the blocks left out"
            decisions.append(NodeDecision(site, reason is None, text))
        return decisions


def site_of(node: fx.Node) -> str | None:
    """The attention whose lists a launch reads, for all of its heads."""
    if LAUNCH_OF in node.meta:
        return str(node.meta[LAUNCH_OF])
    counts = arguments(node)[3]
    if counts.op == "call_function" and isinstance(counts.args[0], fx.Node):
        selector = counts.args[0]  # counts are an item of what a selector returns
        specs = [n.meta.get("ditopt") for n in selector.all_input_nodes]
        return next((spec.node for spec in specs if isinstance(spec, ForcedBlocks)), None)
    spec = counts.meta.get("ditopt")
    return spec.node if isinstance(spec, BlockLists) else None


def _has_remainder(node: fx.Node) -> bool:
    counts = arguments(node)[3]
    return any(user.target is REMAINDER for user in counts.users)


def _reject(node: fx.Node | None, choice: RemainderChoice) -> str | None:
    """Why a site cannot take a linear part, or None."""
    if node is None:
        return "the attention is not block-sparse in one launch"
    q = fake_value(arguments(node)[0])
    wanted = (q.shape[1], q.shape[3], q.shape[3])
    if choice.shape != wanted:
        return (
            f"the plan's projection is {list(choice.shape)}, the attention needs "
            f"[heads, channels, channels] = {list(wanted)}"
        )
    return None


def _rewrite(gm: fx.GraphModule, node: fx.Node, site: str, choice: RemainderChoice) -> None:
    operands: tuple[Any, ...] = arguments(node)[:_ARGUMENTS]
    fake = fake_value(operands[0]).new_empty(choice.shape)
    weight = add_input(gm, f"{site}_projection", fake, RemainderProjection(site, fake.dtype))
    with gm.graph.inserting_after(node):
        linear = gm.graph.call_function(REMAINDER, (*operands, choice.phi))
    with gm.graph.inserting_after(linear):
        turned = gm.graph.call_function(aten.transpose.int, (weight, -1, -2))
    with gm.graph.inserting_after(turned):
        projected = gm.graph.call_function(aten.matmul.default, (linear, turned))
    with gm.graph.inserting_after(projected):
        total = gm.graph.call_function(aten.add.Tensor, (node, projected))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    stack = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
    for created in (linear, turned, projected, total):
        created.meta = dict(stack)
