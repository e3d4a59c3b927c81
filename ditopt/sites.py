"""Attention and linear sites of a captured model: stable ids, kinds, masks.

The kind is read off the data flow: walk back from q and from k to the nearest linear layers and
compare what those read. Equal and one: self. Equal and several: joint (image and text projected
apart, one softmax). Disjoint: cross. Overlapping: joint (text enters k and v only). Sites are found
in a canonical body, once for all blocks that share it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from ditopt.graph import arguments, fake_value, module_path, producers

if TYPE_CHECKING:
    from ditopt.capture import Body, Captured, Piece

Kind = Literal["self", "cross", "joint"]
Form = Literal["softmax", "linear"]
MaskKind = Literal["none", "key_padding", "bias"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.alias.default, aten.detach.default, aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default, aten.to.dtype, aten.type_as.default,
}  # fmt: skip
_MATMULS = {aten.matmul.default, aten.bmm.default}
_POINTWISE = _VIEWS | {
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default,
    aten.relu.default, aten.cat.default, aten.pad.default, aten.constant_pad_nd.default,
    aten.slice.Tensor, aten.select.int, aten.copy.default, aten.slice_scatter.default,
    aten.select_scatter.default,
}  # fmt: skip


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the model.

    Attributes:
        id: module path and ordinal (`blocks.3.attn1#0`).
        kind: self, cross or joint.
        form: softmax, or linear (two matrix products without a softmax; nothing is chosen there).
        heads: H.
        head_dim: D.
        tokens_q, tokens_k: sequence lengths; symbolic where the capture is.
        mask: none, key padding (the same for every query), or a bias per query.
        piece: index of the piece that holds it.
        node: its node's name in the piece's body.
    """

    id: str
    kind: Kind
    form: Form
    heads: int
    head_dim: int
    tokens_q: Any
    tokens_k: Any
    mask: MaskKind
    piece: int
    node: str


@dataclass(frozen=True)
class LinearSite:
    """One linear layer.

    Attributes:
        id: the weight's module path.
        in_features, out_features: K and N.
        piece: index of the piece that holds it.
        node: its node's name in the piece's body.
        weight: slot of its weight, or None where that is computed.
        rows: M, tokens of all samples; symbolic where the capture is.
    """

    id: str
    in_features: int
    out_features: int
    piece: int
    node: str
    weight: int | None = None
    rows: Any = None


def find_sites(captured: Captured) -> tuple[list[AttentionSite], list[LinearSite]]:
    """All sites in execution order."""
    attention: list[AttentionSite] = []
    linear: list[LinearSite] = []
    ordinals: Counter[str] = Counter()
    in_bodies = {key: list(_attention_nodes(body)) for key, body in captured.bodies.items()}
    for index, piece in enumerate(captured.pieces):
        for node, form in in_bodies[piece.body.key]:
            path = instance_path(captured, piece, node)
            site_id = f"{path or 'model'}#{ordinals[path]}"
            ordinals[path] += 1
            attention.append(_describe(site_id, node, form, index))
        linear.extend(
            _describe_linear(captured, piece, index, node)
            for node in piece.body.gm.graph.nodes
            if node.op == "call_function" and node.target is aten.linear.default
        )
    return attention, linear


def instance_path(captured: Captured, piece: Piece, node: fx.Node) -> str:
    """The module path, in the model, of a body's node in the block that `piece` is."""
    path = module_path(node)
    template = piece.body.path
    if template and (path == template or path.startswith(template + ".")):
        path = piece.path + path[len(template) :]
    return ".".join(part for part in (captured.prefix, path) if part)


def attention_operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, Any, float | None]:
    """q, k, v, mask and scale of an SDPA node, however they were passed."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, arguments(node), strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    return q, k, v, given.get("attn_mask"), given.get("scale")


def is_causal(node: fx.Node) -> bool:
    """Whether an SDPA node masks the future."""
    given = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False)
    return bool(given)


def _attention_nodes(body: Body) -> Iterator[tuple[fx.Node, Form]]:
    for node in body.gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is SDPA:
            yield node, "softmax"
        elif node.target in _MATMULS and _linear_attention_keys(node) is not None:
            yield node, "linear"


def _linear_attention_keys(node: fx.Node) -> fx.Node | None:
    """The inner product k^T v of a linear attention q (k^T v), if `node` is its outer product."""
    value = fake_value(node)
    if value is None or value.dim() < 3:
        return None
    for operand in node.args[:2]:
        if not isinstance(operand, fx.Node):
            return None
        inner = _behind_pointwise(operand)
        if inner is not None and fake_value(inner).dim() >= 3:
            return inner
    return None


def _behind_pointwise(node: fx.Node) -> fx.Node | None:
    """The one matrix product that `node` is made from by elementwise work and views alone."""
    seen: set[fx.Node] = set()
    todo, found = [node], None
    while todo:
        current = todo.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if current.target in _MATMULS:
            if found not in (None, current):
                return None
            found = current
        elif current.target in _POINTWISE:
            todo.extend(current.all_input_nodes)
    return found


def _describe(site_id: str, node: fx.Node, form: Form, piece: int) -> AttentionSite:
    if form == "linear":
        inner = _linear_attention_keys(node)
        assert inner is not None
        q_side = next(
            a for a in node.args[:2] if isinstance(a, fx.Node) and _behind_pointwise(a) is not inner
        )
        value = fake_value(q_side)
        heads, (rows, columns) = value.shape[1], value.shape[-2:]
        # q enters as [.., N, D] on the left or as [.., D, N] on the right.
        tokens, size = (rows, columns) if q_side is node.args[0] else (columns, rows)
        kind = _kind(q_side, inner)
        return AttentionSite(
            site_id, kind, form, _int(heads), _int(size), tokens, tokens, "none", piece, node.name
        )
    q, k, _, mask, _ = attention_operands(node)
    q_shape, k_shape = fake_value(q).shape, fake_value(k).shape
    return AttentionSite(
        id=site_id,
        kind=_kind(q, k),
        form=form,
        heads=_int(q_shape[1]) if len(q_shape) == 4 else 1,
        head_dim=_int(q_shape[-1]),
        tokens_q=q_shape[-2],
        tokens_k=k_shape[-2],
        mask=_mask_kind(mask),
        piece=piece,
        node=node.name,
    )


def _int(size: Any) -> int:
    return int(size)


def _mask_kind(mask: Any) -> MaskKind:
    if not isinstance(mask, fx.Node):
        return "none"
    shape = fake_value(mask).shape
    if len(shape) >= 2 and isinstance(shape[-2], int) and shape[-2] == 1:
        return "key_padding"
    return "key_padding" if _broadcast_rows(mask) else "bias"


def _broadcast_rows(mask: fx.Node) -> bool:
    """Whether a full-size mask is an expanded row, the same for every query."""
    value = fake_value(mask)
    return value.dim() >= 2 and isinstance(value.stride(-2), int) and value.stride(-2) == 0


def _projection_inputs(node: fx.Node) -> set[fx.Node]:
    """What the nearest linear layers behind `node` read; without any, the inputs behind it."""
    linears = [
        n
        for n in producers(node, lambda n: n.target is aten.linear.default)
        if n.target is aten.linear.default
    ]
    if linears:
        return {_base(n.args[0]) for n in linears if isinstance(n.args[0], fx.Node)}
    return {_base(n) for n in producers(node, lambda n: n.op == "placeholder")}


def _base(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _kind(q: fx.Node, k: fx.Node) -> Kind:
    from_q, from_k = _projection_inputs(q), _projection_inputs(k)
    if from_q == from_k:
        return "self" if len(from_q) <= 1 else "joint"
    return "joint" if from_q & from_k else "cross"


def _describe_linear(captured: Captured, piece: Piece, index: int, node: fx.Node) -> LinearSite:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    out_features, in_features = fake_value(weight).shape
    name, owner = instance_path(captured, piece, node), None
    base = _base(weight)
    if base.op == "placeholder":
        position = [n for n in piece.body.gm.graph.nodes if n.op == "placeholder"].index(base)
        slot = piece.inputs[position]
        if slot < len(captured.inputs) and captured.inputs[slot].role == "parameter":
            name = captured.inputs[slot].name.rsplit(".", 1)[0]
            owner = slot if base is weight else None
    rows = math.prod(fake_value(arguments(node)[0]).shape[:-1])
    return LinearSite(name, _int(in_features), _int(out_features), index, node.name, owner, rows)
