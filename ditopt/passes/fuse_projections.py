"""Merge linear layers that read one tensor into one matrix product.

    linear(x, Wq) , linear(x, Wk) , linear(x, Wv)   =>   split(linear(x, [Wq; Wk; Wv]))

Preconditions: the weights are the model's own two-dimensional parameters of one dtype, all with or
all without a bias. Benefit: one launch, one read of x. Error: none beyond the order of summation
inside the matrix product. Cost: a copy of the weights (`release_weights` frees the originals).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from ditopt.graph import arguments, fake_value, placeholders
from ditopt.passes.base import MEMBERS, FusedWeight, NodeDecision, PassContext, add_input

aten = torch.ops.aten


class FuseProjections:
    """See the module."""

    name = "fuse_projections"
    after: frozenset[str] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Fuse every group that qualifies."""
        own = {node for k, node in enumerate(placeholders(gm)) if k in ctx.own}
        # Layers that the plan treats differently stay apart.
        groups: dict[tuple[fx.Node, Any], list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is aten.linear.default:
                groups[arguments(node)[0], ctx.linear.get(node.name)].append(node)
        decisions = []
        for members in groups.values():
            if len(members) < 2:
                continue
            reason = _reject(members, ctx, own)
            if reason is None:
                _rewrite(gm, members)
            text = reason or f"{len(members)} projections of one tensor in one matrix product"
            decisions += [NodeDecision(node.name, reason is None, text) for node in members]
        return decisions


def _reject(members: list[fx.Node], ctx: PassContext, own: set[fx.Node]) -> str | None:
    """Why the layers cannot be one, or None."""
    if not ctx.options.fuse_projections:
        return "switched off by the option fuse_projections"
    weights = [_weight(node) for node in members]
    biases = [_bias(node) for node in members]
    if getattr(ctx.linear.get(members[0].name), "calibrated", False):
        return "each layer has a calibrated codebook of its own"
    if not own.issuperset(weights):
        return "a weight is computed, not a parameter"
    if len(set(weights)) < len(weights):
        return "two projections share a weight"
    if len({fake_value(weight).dtype for weight in weights}) > 1:
        return "the weights have several dtypes"
    if len({bias is None for bias in biases}) > 1:
        return "some projections have a bias and some have none"
    if not own.issuperset(bias for bias in biases if bias is not None):
        return "a bias is computed, not a parameter"
    return None


def _weight(linear: fx.Node) -> Any:
    return arguments(linear)[1]


def _bias(linear: fx.Node) -> Any:
    args = arguments(linear)
    return args[2] if len(args) > 2 else None


def _fused_input(gm: fx.GraphModule, parts: list[fx.Node], name: str) -> fx.Node:
    order = placeholders(gm)
    fakes = [fake_value(part) for part in parts]
    rows = sum(fake.shape[0] for fake in fakes)
    fake = fakes[0].new_empty((rows, *fakes[0].shape[1:]))
    return add_input(gm, name, fake, FusedWeight(tuple(order.index(part) for part in parts)))


def _rewrite(gm: fx.GraphModule, members: list[fx.Node]) -> None:
    first = members[0]
    weight = _fused_input(gm, [_weight(n) for n in members], f"{first.name}_fused_weight")
    operands = [arguments(first)[0], weight]
    if _bias(first) is not None:
        bias = _fused_input(gm, [_bias(n) for n in members], f"{first.name}_fused_bias")
        operands.append(bias)
    sizes = [fake_value(_weight(node)).shape[0] for node in members]
    with gm.graph.inserting_before(first):
        fused = gm.graph.call_function(aten.linear.default, tuple(operands))
        split = gm.graph.call_function(aten.split_with_sizes.default, (fused, sizes, -1))
        parts = []
        for k, node in enumerate(members):
            part = gm.graph.call_function(operator.getitem, (split, k))
            part.meta = dict(node.meta)
            parts.append(part)
    for created in (fused, split):
        created.meta = {key: first.meta[key] for key in ("nn_module_stack",) if key in first.meta}
        created.meta["val"] = None  # filled by the runner's propagation
    fused.meta[MEMBERS] = tuple(node.name for node in members)
    for node, part in zip(members, parts, strict=True):
        node.replace_all_uses_with(part)
        gm.graph.erase_node(node)
