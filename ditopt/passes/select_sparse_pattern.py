"""Give every head of an attention the pattern that the plan names.

    sdpa(q, k, v)   =>   cat_h block_sparse(q[:, h], k[:, h], v[:, h], lists[:, h])

The lists are inputs, so the program does not depend on the pattern: blocks and phases with other
patterns run it too. A dense head has full lists, a skipped head empty ones (zeros). `fuse_heads`
makes one launch of the calls.

Preconditions: no mask, not causal, one [B, H, N, D] layout, a known token grid. Error: what the
plan predicts. Papers: Sparse-vDiT (arXiv 2506.03065), Sparse VideoGen (arXiv 2502.01776), Sliding
Tile Attention (arXiv 2502.04507).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ditopt.graph import fake_value
from ditopt.kernels.block_sparse_attention import ops  # noqa: F401  (registers the operator)
from ditopt.passes.base import (
    EXECUTOR,
    BlockLists,
    NodeDecision,
    PassContext,
    SparseChoice,
    add_input,
)
from ditopt.sites import SDPA, attention_operands, is_causal

aten = torch.ops.aten
BLOCK_SPARSE = torch.ops.ditopt.block_sparse_attention.default


class SelectSparsePattern:
    """See the module."""

    name = "select_sparse_pattern"
    after = frozenset({"fuse_projections", "reorder_tokens"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite each attention that the plan names."""
        decisions = [NodeDecision(node, False, reason) for node, reason in ctx.declined.items()]
        for node in list(gm.graph.nodes):
            choice = ctx.sparse.get(node.name)
            if choice is None or node.op != "call_function" or node.target is not SDPA:
                continue
            reason = reject(node, choice.heads)
            if reason is None:
                _rewrite(gm, node, choice)
            text = reason or (
                f"block-sparse, {choice.heads} heads, "
                f"blocks of {choice.block_q} x {choice.block_k} tokens"
            )
            decisions.append(NodeDecision(node.name, reason is None, text))
        return decisions


def reject(node: fx.Node, heads: int) -> str | None:
    """Why an attention cannot take patterns, or None."""
    q, k, v, mask, _ = attention_operands(node)
    if mask is not None:
        return "the attention has a mask, and patterns do not combine with masks yet"
    if is_causal(node):
        return "the attention is causal"
    shapes = [fake_value(x).shape for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        return "the attention's operands are not [B, H, N, D]"
    if shapes[0][1] != heads:
        return f"the plan names {heads} heads, the attention has {shapes[0][1]}"
    if shapes[1][1] != shapes[0][1]:
        return "q and k have different numbers of heads"
    return None


def _rewrite(gm: fx.GraphModule, node: fx.Node, choice: SparseChoice) -> None:
    q, k, v, _, scale = attention_operands(node)
    q_fake = fake_value(q)
    scale = scale if scale is not None else 1.0 / math.sqrt(q_fake.shape[-1])
    q_blocks = -(-choice.tokens_q // choice.block_q)
    k_blocks = -(-choice.tokens_k // choice.block_k)
    counts_fake = q_fake.new_empty((1, choice.heads, q_blocks), dtype=torch.int32)
    ids_fake = q_fake.new_empty((1, choice.heads, q_blocks, k_blocks), dtype=torch.int32)
    counts = add_input(gm, f"{node.name}_counts", counts_fake, BlockLists(node.name, 0))
    ids = add_input(gm, f"{node.name}_ids", ids_fake, BlockLists(node.name, 1))
    operands = (q, k, v, counts, ids)
    with gm.graph.inserting_before(node):
        heads = []
        for head in range(choice.heads):
            dense = head in choice.dense_heads
            parts = tuple(
                gm.graph.call_function(aten.slice.Tensor, (x, 1, head, head + 1))
                for x in (operands[:3] if dense else operands)
            )
            if dense:
                heads.append(gm.graph.call_function(SDPA, parts, {"scale": scale}))
            else:
                arguments: tuple[Any, ...] = (*parts, choice.block_q, choice.block_k, scale)
                heads.append(gm.graph.call_function(BLOCK_SPARSE, arguments))
                heads[-1].meta[EXECUTOR] = choice.executor
        joined = gm.graph.call_function(aten.cat.default, (heads, 1))
    stack = node.meta.get("nn_module_stack")
    for created in (*heads, joined, *(part for head in heads for part in head.all_input_nodes)):
        if stack is not None and created.op == "call_function":
            created.meta.setdefault("nn_module_stack", stack)
    node.replace_all_uses_with(joined)
    gm.graph.erase_node(node)
