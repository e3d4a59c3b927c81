"""8-bit linear layers as QuantizeLinear and DequantizeLinear pairs around a MatMul.

    y = (Q_w(q_x) s_x) (q_w s_w)^T       =>       MatMul(DQ(Q(x, s_x), s_x), DQ(q_w, s_w)^T)

Both have one scale per row of x (computed from the row, at every call) and one per output channel
(stored), so the pairs name axis 0. The numbers are those of `quantization.rowwise` but where x / s
and x * (1 / s) round to different neighbours, about once in 1e5 elements. A runtime that has no
8-bit product for such scales multiplies in float32: exact, and not faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.errors import EngineError
from ditopt.graph import arguments, fake_value

aten = torch.ops.aten

FP8_OPSET = 19
"""The first one whose QuantizeLinear gives 8-bit floats."""

_TYPED_OPSET = 21
"""The first one that names the type of numbers; before, a zero point of that type does."""


@dataclass(frozen=True)
class _Layer:
    """What a matched layer reads, and what stands behind its product.

    Attributes:
        x: [M, K] in float32, and its scales [M, 1].
        weight: numbers [N, K], and their scales [1, N].
        bias, out: what is added, and the result's dtype, where the product did that too.
    """

    x: fx.Node
    scale: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None = None
    out: torch.dtype | None = None


def write_pairs(gm: fx.GraphModule, opset: int) -> int:
    """Replace each 8-bit layer in `gm`; returns how many there were.

    Raises:
        EngineError: the opset has no pairs for the layer's numbers, or a product has another form.
    """
    count = 0
    for node in list(gm.graph.nodes):
        layer = _match(node)
        if layer is None:
            continue
        count += 1
        dtype = fake_value(layer.weight).dtype
        if dtype.is_floating_point and opset < FP8_OPSET:
            raise EngineError(f"8-bit floats need opset {FP8_OPSET}, and {opset} was asked for")
        operands = (layer.x, layer.scale, layer.weight, layer.weight_scale)
        with gm.graph.inserting_before(node):
            y = gm.graph.call_function(product, operands, {"opset": opset})
            if layer.bias is not None:
                y = gm.graph.call_function(aten.add.Tensor, (y, layer.bias))
            if layer.out is not None:
                y = gm.graph.call_function(aten.to.dtype, (y, layer.out))
        node.replace_all_uses_with(y)
    if count:
        gm.graph.eliminate_dead_code()
    for node in gm.graph.nodes:
        if node.target in (aten._int_mm.default, aten._scaled_mm.default):
            raise EngineError(
                f"the operator {node.target} stands in a form that has no counterpart in ONNX",
                remedy="Leave the layer out of the plan, or export to pt2.",
            )
    return count


def product(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, opset: int) -> Tensor:
    """The pairs and the product, [M, N] in float32; to be traced for torch.onnx only."""
    left = _dequantized(_quantized(x, scale.reshape(-1), weight.dtype, opset), scale, opset)
    return left @ _dequantized(weight, weight_scale, opset).t()


def _quantized(x: Tensor, scale: Tensor, dtype: torch.dtype, opset: int) -> Tensor:
    attributes: dict[str, Any] = {"axis": 0}
    inputs: tuple[Tensor, ...] = (x, scale)
    if opset >= _TYPED_OPSET:
        attributes["output_dtype"] = _ONNX_TYPES[dtype]
    else:
        inputs = (x, scale, torch.zeros_like(scale, dtype=dtype))
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", inputs, attributes, dtype=dtype, shape=x.shape, version=opset
    )


_ONNX_TYPES = {torch.int8: 3, torch.float8_e4m3fn: 17}


def _dequantized(numbers: Tensor, scale: Tensor, opset: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (numbers, scale.reshape(-1)), {"axis": 0},
        dtype=torch.float32, shape=numbers.shape, version=opset,
    )  # fmt: skip


def _match(node: fx.Node) -> _Layer | None:
    """The layer whose scaled product a node is, as `rowwise.RowFormat.multiply` writes it."""
    if node.op != "call_function":
        return None
    if node.target is aten._scaled_mm.default:
        numbers, weight, scale, weight_scale, bias, _, out, *_ = arguments(node)
        x, weight = _rounded(numbers), _call(weight, aten.t.default)
        return None if None in (x, weight) else _Layer(x, scale, weight, weight_scale, bias, out)
    inner = _call(node, aten.mul.Tensor)
    total = _call(_call(inner, aten.mul.Tensor), aten.to.dtype)
    if total is None:
        return None
    weight_scale, scale = arguments(inner)[1], arguments(node)[1]
    pair = arguments(total)
    if total.target is aten._int_mm.default:
        x, weight = _rounded(pair[0]), _call(pair[1], aten.t.default)
    elif total.target is aten.mm.default:  # the same numbers, multiplied in float32
        x = _rounded(_call(pair[0], aten.to.dtype))
        weight = _call(_call(pair[1], aten.t.default), aten.to.dtype)
    else:
        return None
    if x is None or weight is None or fake_value(weight).dtype not in _ONNX_TYPES:
        return None
    return _Layer(x, scale, weight, weight_scale)


def _call(node: Any, target: Any) -> Any:
    """The first argument of a call of `target`, or None for anything else."""
    if not isinstance(node, fx.Node) or node.target is not target:
        return None
    return arguments(node)[0]


def _rounded(numbers: Any) -> Any:
    """What was rounded to these numbers by `rowwise.quantize_rows`, or None."""
    clamped = _call(_call(numbers, aten.to.dtype), aten.clamp.default)
    scaled = _call(clamped, aten.round.default) or clamped
    return _call(scaled, aten.mul.Tensor)
