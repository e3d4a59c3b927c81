"""Let the mean of each block that a sparse attention leaves out stand for its tokens.

    block_sparse(q, k, v, lists)
        =>   block_sparse(q, k, v, lists; pooled = means of the blocks on no list)

One weighted token for each such block, in the same softmax: the mass of what is left out is
replaced to first order instead of being given to what is kept. Training-free. Paper: Sol-Attn
(arXiv 2607.24027); mathematics in `kernels.block_sparse_attention.pooling`.

Preconditions: one block-sparse launch for all heads at the site, made by `select_sparse_pattern`
and `fuse_heads` or by a selector. Error: what the plan predicts. Cost: K and V are read once, and
one more key for each block that is left out.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ditopt.graph import arguments, fake_value
from ditopt.kernels.block_sparse_attention import ops_lse as _lse  # noqa: F401  (registers it)
from ditopt.kernels.block_sparse_attention import pooling as _pooling  # noqa: F401  (likewise)
from ditopt.passes.base import (
    BlockBias,
    BlockLists,
    DroppedBlocks,
    NodeDecision,
    PassContext,
    add_input,
)
from ditopt.passes.linearize_attention import site_of
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE

WITH_POOLED = torch.ops.ditopt.block_sparse_attention_with_lse.default
MEANS = torch.ops.ditopt.block_means.default
DROPPED = torch.ops.ditopt.dropped_bits.default
_BEFORE_POOLED = 6  # optional arguments of the operator that stay None
_BITS = 32  # of a word


class SubstituteMeans:
    """See the module."""

    name = "substitute_means"
    after = frozenset(
        {"select_sparse_pattern", "fuse_heads", "select_blocks_online", "select_head_orders"}
    )

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Substitute means at each site for which the plan asks for them."""
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        launches = {site_of(node): node for node in calls if node.target is BLOCK_SPARSE}
        done = {site_of(node) for node in calls if node.target is WITH_POOLED}
        decisions = []
        for site in sorted(ctx.means - done):
            node = launches.get(site)
            if node is None:
                text = "the attention is not block-sparse in one launch"
            else:
                _rewrite(gm, node, site)
                text = "the mean of each key block stands for it where it is left out"
            decisions.append(NodeDecision(site, node is not None, text))
        return decisions


def _rewrite(gm: fx.GraphModule, node: fx.Node, site: str) -> None:
    q, k, v, counts, ids, block_q, block_k, scale = arguments(node)
    fake = fake_value(ids)
    key_blocks = fake.shape[-1]  # lists of plans have full width
    bias_fake = fake_value(q).new_empty((1, 1, key_blocks), dtype=torch.float32)
    bias = add_input(gm, f"{site}_bias", bias_fake, BlockBias(site))
    bits: fx.Node | None = None
    if isinstance(ids.meta.get("ditopt"), BlockLists):  # known before the call, kept with the lists
        words = (*fake.shape[:-1], (key_blocks + _BITS - 1) // _BITS)
        bits = add_input(gm, f"{site}_dropped", fake.new_empty(words), DroppedBlocks(site))
    with gm.graph.inserting_before(node):
        if bits is None:
            bits = gm.graph.call_function(DROPPED, (counts, ids))
        means = [gm.graph.call_function(MEANS, (x, block_k)) for x in (k, v)]
        lists = (q, k, v, counts, ids, block_q, block_k, scale)
        options = (*(None,) * _BEFORE_POOLED, *means, bias, bits)
        both = gm.graph.call_function(WITH_POOLED, (*lists, *options))
        out = gm.graph.call_function(operator.getitem, (both, 0))
    for created in (bits, *means, both, out):
        if created.op == "call_function" and "nn_module_stack" in node.meta:
            created.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
