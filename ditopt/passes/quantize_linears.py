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
from ditopt.kernels.quantize_rows import ops as _rounding  # noqa: F401  (registers the operator)
from ditopt.kernels.quantize_rows.ops import MOST_COLUMNS, MOST_PARTS
from ditopt.passes.base import (
    MEMBERS,
    FusedWeight,
    LinearOperand,
    NodeDecision,
    PassContext,
    add_input,
)
from ditopt.quantization.layer import ROW_FORMATS, STORED_FORMATS, compute, misfit, operands
from ditopt.quantization.limits import missing_hardware, refused_shape

if TYPE_CHECKING:
    from ditopt.quantization import LinearRule

aten = torch.ops.aten
QUANTIZE = torch.ops.ditopt.quantize_rows.default


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
    native = missing_hardware(rule.product, fake_value(node).device) is None
    text = _describe(rule, native, len(members))
    dynamic = rule.transform == "none" and rule.static is None
    wanted = ctx.options.rounding_kernel
    rounded = fake_value(node).device.type == "cuda" if wanted is None else wanted
    taken = rounded and dynamic and rule.product in ROW_FORMATS
    sources = _row_sources(node) if taken else None
    _rewrite(gm, layer, native, sources)
    return True, text if sources is None else f"{text}, rounded by quantize_rows"


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
    reason = misfit(rule, k)
    if reason is not None:
        return reason
    missing = missing_hardware(rule.product, x.device)
    if missing is not None:
        return None if rule.simulate else f"{missing}, and the plan does not say simulate"
    rows = x.numel() // k
    return refused_shape(rule.product, x.device, rows, k, n, x.dtype)


def _describe(rule: LinearRule, native: bool, members: int) -> str:
    row = ROW_FORMATS.get(rule.product or "")
    text = f"{rule.format} by {row.operator(native=native)}" if row is not None else rule.format
    if rule.format in STORED_FORMATS:
        text += ", decoded at every call: smaller, not faster"
    if rule.transform != "none":
        text += f", {rule.transform}"
    if rule.static is not None:
        text += f", input by the static scale of range {rule.static}"
    return text if members == 1 else f"{text}, {members} layers in one"


def _row_sources(node: fx.Node) -> list[tuple[fx.Node, str]] | None:
    """What the layer's input consists of, with the activation before each part.

    None where the kernel has nothing to take in: the compiler fuses a norm better, since it adds
    the residual in the same kernel.
    """
    x = arguments(node)[0]
    parts = [x]
    if x.target is aten.cat.default and len(x.users) == 1:
        axis = arguments(x)[1] if len(arguments(x)) > 1 else 0
        parts = arguments(x)[0] if axis in (-1, fake_value(x).dim() - 1) else [x]
    found = [(part, "none") if (a := _activation(part)) is None else a for part in parts]
    return found if x is not found[0][0] and held_shapes(found) else None


def held_shapes(found: list[tuple[fx.Node, str]]) -> bool:
    """Whether one program of the kernel can hold a row."""
    columns = [fake_value(part).shape[-1] for part, _ in found]
    return len(columns) <= MOST_PARTS and all(k <= MOST_COLUMNS for k in columns)


def _activation(x: fx.Node) -> tuple[fx.Node, str] | None:
    """The input and the name of an activation that nobody else reads."""
    if len(x.users) > 1:
        return None
    if x.target is aten.silu.default:
        return arguments(x)[0], "silu"
    if x.target is aten.gelu.default:
        given = arguments(x)
        kind = x.kwargs.get("approximate", given[1] if len(given) > 1 else "none")
        return given[0], "gelu_tanh" if kind == "tanh" else "gelu"
    return None


def _rewrite(
    gm: fx.GraphModule,
    layer: _Layer,
    native: bool,
    sources: list[tuple[fx.Node, str]] | None = None,
) -> None:
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
        first = fx.Proxy(x if sources is None else sources[0][0], tracer)
        flat = first
        if fake.dim() != 2 and sources is None:
            flat = aten.reshape.default(flat, [-1, k])
        rounded = None if sources is None else _rounded(sources, rule, tracer)
        sizes = {"n": n, "k": k, "dtype": fake.dtype}
        y = compute(rule, flat, made, bias, **sizes, native=native, rounded=rounded)
        if fake.dim() != 2:
            y = aten.reshape.default(y, [*_leading(first, fake), n])
    for created in gm.graph.nodes:
        if created not in before and "nn_module_stack" in node.meta:
            created.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    y.node.meta = dict(node.meta)
    y.node.meta.pop(MEMBERS, None)
    node.replace_all_uses_with(y.node)
    gm.graph.erase_node(node)
    if sources is not None:  # the activations and the concatenation are inside the kernel now
        erase_unused(gm.graph, _behind(x))
    # A merged weight that nobody reads any more is not to be made.
    merged = [a for a in (weight, *rest) if isinstance(a, fx.Node) and "ditopt" in a.meta]
    erase_unused(gm.graph, merged)


def _rounded(
    sources: list[tuple[fx.Node, str]], rule: LinearRule, tracer: GraphAppendingTracer
) -> tuple[fx.Proxy, fx.Proxy]:
    """Numbers and scales by `kernels.quantize_rows`."""
    parts = [
        aten.reshape.default(fx.Proxy(part, tracer), [-1, fake_value(part).shape[-1]])
        for part, _ in sources
    ]
    names = [name for _, name in sources]
    pair = QUANTIZE(parts, names, ROW_FORMATS[rule.product or ""].dtype)
    return pair[0], pair[1]


def _behind(x: fx.Node) -> list[fx.Node]:
    """A concatenation or activation and what it reads, in the order of the graph."""
    return [*x.all_input_nodes, x]


def _leading(x: fx.Proxy, fake: Any) -> list[Any]:
    """Sizes of all axes but the last; symbolic ones are read at run time."""
    sizes = list(fake.shape[:-1])
    return [s if isinstance(s, int) else aten.sym_size.int(x, d) for d, s in enumerate(sizes)]
