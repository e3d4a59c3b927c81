"""Compute the matrix products of an attention in 8 bits where the plan says so.

    sdpa(q, k, v)                  =>   block_sparse_8bit(q, k, v, lists of every block)
    block_sparse(q, k, v, lists)   =>   block_sparse_8bit(q, k, v, lists)

An attention that cannot be computed so keeps the model's own arithmetic: nothing else may stand in
for what was asked for by name. Only Hopper GPUs have the kernel; elsewhere a rule that allows
simulation gets the same numbers from the kernel's reference.

Preconditions: see `_reject`. Error: what the plan predicts. Paper: SageAttention 2 (arXiv
2411.10958); arithmetic in `kernels.block_sparse_attention.reference_8bit`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ditopt.graph import arguments, fake_value
from ditopt.kernels.block_sparse_attention import ops_8bit
from ditopt.passes.base import (
    LAUNCH_OF,
    ArithmeticChoice,
    BlockLists,
    NodeDecision,
    PassContext,
    add_input,
)
from ditopt.passes.linearize_attention import site_of
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, reject
from ditopt.sites import SDPA, attention_operands

IN_8_BITS = torch.ops.ditopt.block_sparse_attention_8bit.default
SIMULATED = torch.ops.ditopt.block_sparse_attention_8bit_simulated.default
_TOKENS = 2  # their dimension in [B, H, N, D]


class QuantizeAttention:
    """See the module."""

    name = "quantize_attention"
    after = frozenset({"reorder_tokens", "select_sparse_pattern", "fuse_heads"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite each attention for which the plan names an arithmetic."""
        calls = [node for node in gm.graph.nodes if node.op == "call_function"]
        found = {node.name: node for node in calls if node.target is SDPA}
        found |= {site_of(node) or "": node for node in calls if node.target is BLOCK_SPARSE}
        done = {site_of(node) for node in calls if node.target in (IN_8_BITS, SIMULATED)}
        decisions = []
        for site, choice in sorted(ctx.arithmetic.items()):
            if site not in done:
                applied, text = _quantize(gm, found.get(site), site, choice, ctx)
                decisions.append(NodeDecision(site, applied, text))
        return decisions


def _quantize(
    gm: fx.GraphModule, node: fx.Node | None, site: str, choice: ArithmeticChoice, ctx: PassContext
) -> tuple[bool, str]:
    """Whether the attention was rewritten, and why or why not."""
    if node is None:
        return False, "the attention is not one launch for all heads"
    reason = _reject(node, choice)
    if reason is not None:
        return False, reason
    q = fake_value(_operands(node)[0])
    blocks = (choice.block_q, choice.block_k)
    missing = ops_8bit.reason_to_decline(q, *blocks)
    if missing is not None and not choice.simulate:
        return False, f"{missing}, and the plan does not say simulate"
    if missing is not None and q.is_cuda and ctx.options.cuda_graphs:
        return False, "simulated products wait for the device, which a CUDA graph cannot"
    lists = _lists(gm, node, site, choice)
    _rewrite(gm, node, lists, IN_8_BITS if missing is None else SIMULATED, choice.kind)
    what = "the site's lists" if choice.listed else "every block"
    text = f"{choice.kind} on {what}, blocks of {blocks[0]} x {blocks[1]} tokens"
    return True, text if missing is None else f"{text}, simulated and slower: {missing}"


def _reject(node: fx.Node, choice: ArithmeticChoice) -> str | None:
    """Why an attention on whatever device cannot multiply in 8 bits, or None."""
    q, k, v = (fake_value(x) for x in _operands(node))
    if node.target is SDPA:
        if choice.listed:
            return "the site's patterns were not applied, so there are no lists to go with"
        if attention_operands(node)[3] is not None:
            return "the attention has a mask, which the 8-bit kernel does not take"
        reason = reject(node, q.shape[1] if q.dim() == 4 else 0)
        if reason is not None:
            return reason
        if q.shape[_TOKENS] != k.shape[_TOKENS]:
            return "queries and keys are different sequences"
    if v.shape[-1] != q.shape[-1]:
        return f"values have {v.shape[-1]} channels, queries have {q.shape[-1]}"
    return None


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """q, k and v."""
    return attention_operands(node)[:3] if node.target is SDPA else arguments(node)[:3]


def _lists(
    gm: fx.GraphModule, node: fx.Node, site: str, choice: ArithmeticChoice
) -> tuple[Any, ...]:
    """Operands of a block-sparse call in the attention's place, without the arithmetic."""
    if node.target is BLOCK_SPARSE:
        return tuple(arguments(node))
    q, k, v, _, scale = attention_operands(node)
    fake = fake_value(q)
    blocks = (choice.block_q, choice.block_k)
    rows = -(-fake.shape[_TOKENS] // choice.block_q)
    columns = -(-fake_value(k).shape[_TOKENS] // choice.block_k)
    counts_fake = fake.new_empty((1, 1, rows), dtype=torch.int32)
    ids_fake = fake.new_empty((1, 1, rows, columns), dtype=torch.int32)
    counts = add_input(gm, f"{site}_counts", counts_fake, BlockLists(site, 0))
    ids = add_input(gm, f"{site}_ids", ids_fake, BlockLists(site, 1))
    return q, k, v, counts, ids, *blocks, fake.shape[-1] ** -0.5 if scale is None else scale


def _rewrite(
    gm: fx.GraphModule, node: fx.Node, lists: tuple[Any, ...], target: Any, kind: str
) -> None:
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(target, (*lists, kind != "int8_qk"))
    kept = ("nn_module_stack", LAUNCH_OF)
    call.meta = {key: node.meta[key] for key in kept if key in node.meta}
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
