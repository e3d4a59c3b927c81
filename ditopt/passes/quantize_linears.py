"""Compute linear layers in the number formats that the plan names.

    linear(x, W, b)   =>   multiply(round(T x), round(W T^-1)) * scales + b

The input is rounded by plain operators, which the compiler fuses into what makes it. Rounded
weights are further inputs, made once outside of the graph; `weights.DerivedTensors` makes them
again when an original changes. Layers that `fuse_projections` merged stay merged: scales belong to
output channels, so those of the parts lie one after the other.

Preconditions: see `_reject`. Error: what the plan predicts; with format `none`, rounding only.
Papers: ViDiT-Q (arXiv 2406.02540), LRQ-DiT (2508.03485), VQ4DiT (2408.17131), ConvRot (2512.03673).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from ditopt.graph import arguments, erase_unused, fake_value, placeholders
from ditopt.passes.base import (
    MEMBERS,
    FusedWeight,
    LinearOperand,
    NodeDecision,
    PassContext,
    add_input,
)
from ditopt.quantization.layer import ROW_FORMATS, STORED_FORMATS, compute, operands
from ditopt.quantization.limits import missing_hardware, refused_shape
from ditopt.quantization.transforms import rotation_block

if TYPE_CHECKING:
    from ditopt.quantization import LinearRule

aten = torch.ops.aten


@dataclass(frozen=True)
class _Layer:
    """A linear node with the positions of the inputs that its operands are made from."""

    node: fx.Node
    rule: LinearRule
    members: tuple[str, ...]
    weights: tuple[int, ...]
    biases: tuple[int, ...]


class QuantizeLinears:
    """See the module."""

    name = "quantize_linears"
    after = frozenset({"fuse_projections"})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        """Rewrite each layer that the plan names."""
        decisions = []
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target is not aten.linear.default:
                continue
            members = node.meta.get(MEMBERS, (node.name,))
            rule = ctx.linear.get(members[0])
            if rule is None:
                continue
            done, reason = _quantize(gm, node, members, rule, ctx)
            decisions += [NodeDecision(member, done, reason) for member in members]
        return decisions


def _quantize(
    gm: fx.GraphModule,
    node: fx.Node,
    members: tuple[str, ...],
    rule: LinearRule | str,
    ctx: PassContext,
) -> tuple[bool, str]:
    """Whether the layer was rewritten, and why or why not."""
    if isinstance(rule, str):
        return False, rule
    layer = _sources(gm, node, members, rule, ctx)
    reason = layer if isinstance(layer, str) else _reject(node, rule)
    if reason is not None or isinstance(layer, str):
        return False, str(reason)
    native = missing_hardware(rule.format, fake_value(node).device) is None
    text = _describe(rule, native, len(members))
    _rewrite(gm, layer, native)
    return True, text


def _sources(
    gm: fx.GraphModule,
    node: fx.Node,
    members: tuple[str, ...],
    rule: LinearRule,
    ctx: PassContext,
) -> _Layer | str:
    """Where weight and bias come from, or why they cannot be replaced."""
    order = placeholders(gm)
    operands_of = [arg for arg in arguments(node)[1:] if isinstance(arg, fx.Node)]
    found = []
    for operand, what in zip(operands_of, ("weight", "bias"), strict=False):
        spec = operand.meta.get("ditopt")
        if isinstance(spec, FusedWeight):
            found.append(spec.positions)
        elif operand.op == "placeholder" and order.index(operand) in ctx.own:
            found.append((order.index(operand),))
        else:
            return f"its {what} is computed, not a parameter"
    weight = operands_of[0]
    if len(weight.users) > 1:
        return "the weight is tied: another operator reads it too"
    biases = found[1] if len(found) > 1 and rule.transform == "centre" else ()
    return _Layer(node, rule, members, found[0], biases)


def _reject(node: fx.Node, rule: LinearRule) -> str | None:
    """Why a layer with replaceable weights cannot take its rule, or None."""
    x, weight = (fake_value(arg) for arg in arguments(node)[:2])
    n, k = weight.shape
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')} already"
    if weight.dtype != x.dtype:
        return f"weight and input have different dtypes ({weight.dtype}, {x.dtype})"
    if rule.transform == "rotate" and rotation_block(k) is None:
        return f"K = {k} is no multiple of 4, as the rotation needs"
    stored = STORED_FORMATS.get(rule.format)
    if stored is not None and k % stored.multiple:
        return f"K = {k} is no multiple of {stored.multiple}, as {rule.format} needs"
    missing = missing_hardware(rule.format, x.device)
    if missing is not None:
        return None if rule.simulate else f"{missing}, and the plan does not say simulate"
    rows = x.numel() // k
    return refused_shape(rule.format, x.device, rows, k, n, x.dtype)


def _describe(rule: LinearRule, native: bool, members: int) -> str:
    row = ROW_FORMATS.get(rule.format)
    text = f"{rule.format} by {row.operator(native=native)}" if row is not None else rule.format
    if row is None and rule.format != "none":
        text += ", decoded at every call: smaller, not faster"
    if rule.transform != "none":
        text += f", {rule.transform}"
    return text if members == 1 else f"{text}, {members} layers in one"


def _rewrite(gm: fx.GraphModule, layer: _Layer, native: bool) -> None:
    node, rule = layer.node, layer.rule
    x, weight, *rest = arguments(node)
    fake, w = fake_value(x), fake_value(weight)
    n, k = w.shape
    tracer = GraphAppendingTracer(gm.graph)
    made = {}
    for name, (shape, dtype) in operands(rule, n, k, w.dtype).items():
        spec = LinearOperand(layer.members[0], rule, layer.weights, layer.biases, name)
        value = w.new_empty(shape, dtype=dtype)
        made[name] = fx.Proxy(add_input(gm, f"{node.name}_{name}", value, spec), tracer)
    bias = fx.Proxy(rest[0], tracer) if rest and rest[0] is not None else None
    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(node):
        flat = fx.Proxy(x, tracer)
        if fake.dim() != 2:
            flat = aten.reshape.default(flat, [-1, k])
        y = compute(rule, flat, made, bias, n=n, k=k, dtype=fake.dtype, native=native)
        if fake.dim() != 2:
            y = aten.reshape.default(y, [*_leading(fx.Proxy(x, tracer), fake), n])
    for created in gm.graph.nodes:
        if created not in before and "nn_module_stack" in node.meta:
            created.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    y.node.meta = dict(node.meta)
    y.node.meta.pop(MEMBERS, None)
    node.replace_all_uses_with(y.node)
    gm.graph.erase_node(node)
    # A merged weight that nobody reads any more is not to be made.
    merged = [a for a in (weight, *rest) if isinstance(a, fx.Node) and "ditopt" in a.meta]
    erase_unused(gm.graph, merged)


def _leading(x: fx.Proxy, fake: Any) -> list[Any]:
    """Sizes of all axes but the last; symbolic ones are read at run time."""
    sizes = list(fake.shape[:-1])
    return [s if isinstance(s, int) else aten.sym_size.int(x, d) for d, s in enumerate(sizes)]
