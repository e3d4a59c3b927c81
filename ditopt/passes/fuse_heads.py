"""All heads of an attention in one launch, whatever their patterns and densities.

    cat_h block_sparse(q[:, h], ..., lists[:, h])   =>   block_sparse(q, ..., lists)

Dense heads that were left to scaled_dot_product_attention, because its measured cost is lower, stay
there: neighbours become one call, and so do the block-sparse heads between them.

Preconditions: the calls read consecutive heads of the same tensors with the same block sizes.
Error: none; each head's arithmetic is the same. Benefit: one launch that fills the chip instead of
H that do not.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import fx

from ditopt.graph import arguments, erase_unused, fake_value
from ditopt.kernels.block_sparse_attention import ops  # noqa: F401  (registers the operator)
from ditopt.passes.base import EXECUTOR, NodeDecision, PassContext
from ditopt.sites import SDPA

aten = torch.ops.aten
BLOCK_SPARSE = torch.ops.ditopt.block_sparse_attention.default
_TENSORS: dict[Any, int] = {BLOCK_SPARSE: 5, SDPA: 3}  # q, k, v and the two lists


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
            sparse = sum(call.target is BLOCK_SPARSE for call in calls)
            text = f"{sparse} heads in one launch"
            if sparse < len(calls):
                text = f"{sparse} heads block-sparse, {len(calls) - sparse} dense ones apart"
            decisions.append(NodeDecision(name, reason is None, reason or text))
        return decisions


def _match(node: fx.Node) -> list[fx.Node]:
    """The calls of one head each that a concatenation joins; empty where it joins anything else."""
    if node.op != "call_function" or node.target is not aten.cat.default:
        return []
    calls: list[fx.Node] = arguments(node)[0]
    fits = all(
        call.op == "call_function" and call.target in _TENSORS and fake_value(call).shape[1] == 1
        for call in calls
    )
    return calls if fits and any(call.target is BLOCK_SPARSE for call in calls) else []


def _sources(call: fx.Node, head: int) -> tuple[Any, ...] | None:
    """The call's arguments with all heads, if it takes exactly `head` of each tensor."""
    args, tensors = arguments(call), _TENSORS[call.target]
    for part in args[:tensors]:
        if part.target is not aten.slice.Tensor or arguments(part)[1:] != (1, head, head + 1):
            return None
    return (*(arguments(part)[0] for part in args[:tensors]), *args[tensors:], call.kwargs)


def _reject(calls: list[fx.Node]) -> str | None:
    """Why the calls cannot be one, or None."""
    firsts: dict[Any, tuple[Any, ...]] = {}
    for head, call in enumerate(calls):
        sources = _sources(call, head)
        if sources is None:
            return "the calls do not read consecutive heads"
        if firsts.setdefault(call.target, sources) != sources:
            return "the calls read different tensors or block sizes"
    if len({first[:3] for first in firsts.values()}) > 1:
        return "the calls read different tensors or block sizes"
    if fake_value(next(iter(firsts.values()))[0]).shape[1] != len(calls):
        return "the calls do not cover all heads"
    return None


def _rewrite(gm: fx.GraphModule, joined: fx.Node, calls: list[fx.Node]) -> None:
    parts = [part for call in calls for part in arguments(call)[: _TENSORS[call.target]]]
    fused = []
    with gm.graph.inserting_before(joined):
        for target, group in groupby(enumerate(calls), key=lambda item: item[1].target):
            run = list(group)
            fused.append(_one_call(gm, target, run[0][0], run[-1][0] + 1, calls))
        result = fused[0]
        if len(fused) > 1:
            result = gm.graph.call_function(aten.cat.default, (fused, 1))
    executor = {key: call.meta[key] for call in calls for key in (EXECUTOR,) if key in call.meta}
    result.meta = {**joined.meta, **(executor if len(fused) == 1 else {})}
    if len(fused) > 1:
        stack = {key: joined.meta[key] for key in ("nn_module_stack",) if key in joined.meta}
        for call in fused:
            call.meta.update(stack | (executor if call.target is BLOCK_SPARSE else {}))
    joined.replace_all_uses_with(result)
    gm.graph.erase_node(joined)
    erase_unused(gm.graph, calls)
    erase_unused(gm.graph, dict.fromkeys(parts))


def _one_call(gm: fx.GraphModule, target: Any, first: int, end: int, calls: Any) -> fx.Node:
    """A call for heads `first` to `end`, on whole tensors where those are all."""
    *args, kwargs = _sources(calls[first], first) or ()
    tensors = args[: _TENSORS[target]]
    if end - first < len(calls):
        tensors = [gm.graph.call_function(aten.slice.Tensor, (x, 1, first, end)) for x in tensors]
    return gm.graph.call_function(target, (*tensors, *args[_TENSORS[target] :]), dict(kwargs))
