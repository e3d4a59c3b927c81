"""Let an attention choose its blocks from each call's queries and keys, as the plan says.

    sdpa(q, k, v)   =>   block_sparse(q, k, v, *select_blocks_pooled(q, k, forced))

`forced` is an input: the blocks that are kept whatever they score (text, the diagonal, a static
pattern), so one program serves every shape of text. Nothing waits for the device, and the lists
have full width, so CUDA graphs can record it. A choice that serves several computed steps, exact
mass, and rules that look at whole heads are the operator `select_blocks`, which also reads a number
of its own: the step runtime keeps its lists.

Preconditions: as for `select_sparse_pattern`. Error: not predicted; it follows the data. Papers:
VSA (arXiv 2505.13389), SpargeAttn (arXiv 2502.18137), Sol-Attn (arXiv 2607.24027), AdaSpa
(arXiv 2502.21079), DraftAttention (arXiv 2505.14708).
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from ditopt.graph import fake_value
from ditopt.kernels.block_selection import ops as _selection  # noqa: F401  (registers operators)
from ditopt.kernels.block_selection import ops_kept as _kept  # noqa: F401  (likewise)
from ditopt.kernels.block_selection.reference import RULES
from ditopt.passes.base import (
    EXECUTOR,
    ForcedBlocks,
    NodeDecision,
    OnlineChoice,
    PassContext,
    add_input,
    add_slot,
)
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, reject
from ditopt.sites import SDPA, attention_operands

SELECT = torch.ops.ditopt.select_blocks_pooled.default
SELECT_KEPT = torch.ops.ditopt.select_blocks.default


class SelectBlocksOnline:
    """See the module."""

    name = "select_blocks_online"
    after = frozenset({"fuse_projections", "reorder_tokens"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite each attention for which the plan names a selector."""
        decisions = []
        for node in list(gm.graph.nodes):
            choice = ctx.online.get(node.name)
            if choice is None or node.op != "call_function" or node.target is not SDPA:
                continue
            reason = reject(node, choice.heads)
            if reason is None:
                _rewrite(gm, node, choice)
            decisions.append(NodeDecision(node.name, reason is None, reason or _text(choice)))
        return decisions


def _text(choice: OnlineChoice) -> str:
    scores = {"pooled": "pooled blocks", "mass": "the exact mass of blocks"}[choice.scores]
    when = "every call" if choice.refresh == 1 else f"one of {choice.refresh} computed calls"
    return (
        f"{choice.rule} {choice.amount:g} of {scores} of {choice.block_q} x {choice.block_k} "
        f"tokens, chosen at {when}"
    )


def _rewrite(gm: fx.GraphModule, node: fx.Node, choice: OnlineChoice) -> None:
    q, k, v, _, scale = attention_operands(node)
    q_fake = fake_value(q)
    scale = scale if scale is not None else 1.0 / math.sqrt(q_fake.shape[-1])
    shape = (-(-choice.tokens_q // choice.block_q), -(-choice.tokens_k // choice.block_k))
    fake = q_fake.new_empty(shape, dtype=torch.bool)
    forced = add_input(gm, f"{node.name}_forced", fake, ForcedBlocks(node.name))
    blocks = (choice.block_q, choice.block_k)
    rule = (choice.rule, choice.amount, choice.minimum)
    stateless = choice.scores == "pooled" and choice.rule in RULES and choice.refresh == 1
    slot = None if stateless else add_slot(gm, node.name, q_fake)
    with gm.graph.inserting_before(node):
        settings = (*blocks, *rule, scale)
        if slot is None:
            lists = gm.graph.call_function(SELECT, (q, k, forced, *settings))
        else:
            kept = (q, k, forced, slot, choice.scores, *settings, choice.refresh)
            lists = gm.graph.call_function(SELECT_KEPT, kept)
        counts, ids = (gm.graph.call_function(operator.getitem, (lists, part)) for part in (0, 1))
        sparse = gm.graph.call_function(BLOCK_SPARSE, (q, k, v, counts, ids, *blocks, scale))
    sparse.meta = {**node.meta, EXECUTOR: choice.executor}
    for created in (lists, counts, ids):
        created.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
    node.replace_all_uses_with(sparse)
    gm.graph.erase_node(node)
