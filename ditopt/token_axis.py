"""Follow the token axis through a canonical graph: is everything in it token-wise or attention?

A function f commutes with an order of tokens where f(permute(x)) = permute(f(x)). The analysis
proves that operator by operator. The *axes* of a value say along which of its dimensions grid
tokens lie, and where they start there (text may stand before and after them): permuting the inputs
along their axes permutes the value along its own. An operator that would mix, split or reduce the
tokens ends the analysis with a reason. Nothing is guessed: an operator without a rule is a reason.

Attention permutes with its queries, and does not see an order of its keys as long as values and
mask share it; no sum over all tokens sees one. That is what makes an order exact up to the order of
summation (attention.md, sections 9 and A1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.graph import fake_value, output_nodes, placeholders
from ditopt.sites import SDPA, attention_operands, is_causal

Axes = Mapping[int, int]
"""Dimension -> where the grid's tokens start along it."""

aten = torch.ops.aten
NONE: Axes = {}


class Mixes(Exception):
    """The graph does something to tokens that depends on their order; the message says what."""


class _Constant(dict[int, int]):
    """Axes of a value that is the same everywhere (zeros): it takes part in any order."""


CONSTANT: Axes = _Constant()


def follow(
    gm: fx.GraphModule, inputs: Sequence[Axes], tokens: int
) -> tuple[list[Axes], dict[str, Axes]]:
    """The axes of what a graph returns, and those of its attentions' queries by node name.

    Args:
        gm: a canonical graph of fixed sizes.
        inputs: axes of each placeholder.
        tokens: of the grid.

    Raises:
        Mixes: an operator depends on the order of the tokens, or has no rule.
    """
    axes: dict[fx.Node, Axes] = dict(zip(placeholders(gm), inputs, strict=True))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            axes[node] = _Step(node, axes, tokens).axes()
        elif node.op not in ("placeholder", "output"):
            raise Mixes(f"{node.op} {node.target} has no rule")
    queries = {
        node.name: axes.get(attention_operands(node)[0], NONE)
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is SDPA
    }
    return [axes.get(node, NONE) for node in output_nodes(gm)], queries


class _Step:
    """One node: its operands with their axes, and the rules."""

    def __init__(self, node: fx.Node, axes: Mapping[fx.Node, Axes], tokens: int) -> None:
        self.node = node
        self.known = axes
        self.tokens = tokens
        self.value = fake_value(node)
        self.name = str(node.target)

    def axes(self) -> Axes:
        marked = [n for n in self.node.all_input_nodes if self.known.get(n)]
        if self.node.target in _CONSTANTS:
            return CONSTANT
        if not marked:
            constant = [isinstance(self.known.get(n), _Constant) for n in self._tensor_inputs()]
            return CONSTANT if constant and all(constant) else NONE
        rule = _RULES.get(self.node.target)
        if rule is None and torch.Tag.pointwise in getattr(self.node.target, "tags", ()):
            rule = _Step.pointwise
        if rule is None:
            raise Mixes(f"{self.name} has no rule")
        return rule(self)

    def _tensor_inputs(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if isinstance(fake_value(n), Tensor)]

    def operand(self, position: int) -> tuple[Any, Axes]:
        """Fake value and axes of a positional argument."""
        node: Any = self.node.args[position]
        return fake_value(node), self.known.get(node, NONE)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)

    def refuse(self, what: str) -> Mixes:
        return Mixes(f"{self.name} {what}")

    # Rules: each returns the axes of the result.

    def pointwise(self) -> Axes:
        """Broadcast from the right; every operand with an extent has the same axis there."""
        return self.together(self._tensor_inputs())

    def together(self, operands: Sequence[fx.Node]) -> Axes:
        rank = self.value.dim()
        result: dict[int, int] = {}
        for node in operands:
            shift = rank - fake_value(node).dim()
            for dim, start in self.known.get(node, NONE).items():
                if result.setdefault(dim + shift, start) != start:
                    raise self.refuse("joins values whose tokens stand at different places")
        for node in operands:
            value, own = fake_value(node), self.known.get(node, NONE)
            if isinstance(own, _Constant):
                continue
            shift = rank - value.dim()
            for dim in result:
                if dim >= shift and value.shape[dim - shift] != 1 and dim - shift not in own:
                    raise self.refuse("joins tokens with a value in a fixed order")
        return result

    def same(self) -> Axes:
        return self.operand(0)[1]

    def view(self) -> Axes:
        """A dimension of tokens stays one if as many elements lie before it as did."""
        value, own = self.operand(0)
        result = {}
        for dim, start in own.items():
            before = prod(value.shape[:dim])
            places = [
                k
                for k, size in enumerate(self.value.shape)
                if size == value.shape[dim] and prod(self.value.shape[:k]) == before
            ]
            if not places:
                raise self.refuse("splits or merges the token axis")
            result[places[0]] = start
        return result

    def expand(self) -> Axes:
        value, own = self.operand(0)
        return {dim + self.value.dim() - value.dim(): start for dim, start in own.items()}

    def permute(self) -> Axes:
        value, own = self.operand(0)
        order = [d % value.dim() for d in self.argument(1, "dims")]
        return {order.index(dim): start for dim, start in own.items()}

    def transpose(self) -> Axes:
        value, own = self.operand(0)
        rank = value.dim()
        if self.node.target is aten.t.default:
            first, second = 0, rank - 1
        else:
            first, second = (self.argument(k, f"dim{k - 1}") % rank for k in (1, 2))
        swap = {first: second, second: first}
        return {swap.get(dim, dim): start for dim, start in own.items()}

    def unsqueeze(self) -> Axes:
        place = self.argument(1, "dim") % self.value.dim()
        return {dim + (dim >= place): start for dim, start in self.operand(0)[1].items()}

    def squeeze(self) -> Axes:
        value, own = self.operand(0)
        given = self.argument(1, "dim", range(value.dim()))
        dims = [given] if isinstance(given, int) else given
        gone = {d % value.dim() for d in dims if value.shape[d] == 1}
        return {dim - sum(g < dim for g in gone): start for dim, start in own.items()}

    def away_from(self, dims: Sequence[int], what: str) -> Axes:
        """The operand's axes, none of which may be among `dims`."""
        value, own = self.operand(0)
        if any(d % value.dim() in own for d in dims):
            raise self.refuse(what)
        return own

    def select(self) -> Axes:
        dim = self.argument(1, "dim")
        own = self.away_from([dim], "picks one token")
        dim %= self.operand(0)[0].dim()
        return {d - (d > dim): start for d, start in own.items()}

    def part(self) -> Axes:
        """A slice holds all of the grid's tokens or none of them."""
        value, own = self.operand(0)
        dim = self.argument(1, "dim", 0) % value.dim()
        if dim not in own:
            return own
        size = value.shape[dim]
        first, last, step = (
            self.argument(k, n) for k, n in ((2, "start"), (3, "end"), (4, "step"))
        )
        first, last, step = slice(first, last, step).indices(size)
        return self.cut(own, dim, first, last, step)

    def cut(self, own: Axes, dim: int, first: int, last: int, step: int = 1) -> Axes:
        start = own[dim]
        rest = {d: s for d, s in own.items() if d != dim}
        if last <= start or first >= start + self.tokens:
            return rest
        if first <= start and last >= start + self.tokens and step == 1:
            return {**rest, dim: start - first}
        raise self.refuse("takes a part of the tokens")

    def pieces(self) -> Axes:
        """Splits answer at their items: see `item`."""
        return self.same()

    def item(self) -> Axes:
        """One result of an operator with several."""
        source: Any = self.node.args[0]
        index: Any = self.node.args[1]
        own = self.known[source]
        if source.target in _STATISTICS:
            return own  # mean and deviation keep the dimensions, with extent 1 where they reduce
        if source.target not in _SPLITS:
            raise self.refuse(f"takes a result of {source.target}")
        whole = fake_value(source.args[0])
        inner = _Step(source, self.known, self.tokens)
        at = 1 if source.target is aten.unbind.int else 2
        dim = inner.argument(at, "dim", 0) % whole.dim()
        if source.target is aten.unbind.int:
            if dim in own:
                raise self.refuse("picks one token")
            return {d - (d > dim): start for d, start in own.items()}
        if dim not in own:
            return own
        first = sum(part.shape[dim] for part in inner.value[:index])
        return self.cut(own, dim, first, first + self.value.shape[dim])

    def cat(self) -> Axes:
        """Along the tokens, one part holds them all; along another dimension, parts agree."""
        parts: Any = self.node.args[0]
        dim = self.argument(1, "dim", 0) % self.value.dim()
        along = [n for n in parts if dim in self.known.get(n, NONE)]
        others = {d: s for n in parts for d, s in self.known.get(n, NONE).items() if d != dim}
        for node in parts:
            own = self.known.get(node, NONE)
            if isinstance(own, _Constant):
                continue
            if {d: s for d, s in own.items() if d != dim} != others:
                raise self.refuse("joins tokens with a value in a fixed order")
        if not along:
            return others
        if len(along) > 1:
            raise self.refuse("puts the tokens twice into one sequence")
        at = list(parts).index(along[0])
        before = sum(fake_value(n).shape[dim] for n in parts[:at])
        return {**others, dim: before + self.known[along[0]][dim]}

    def stack(self) -> Axes:
        parts: Any = self.node.args[0]
        own = [self.known.get(n, NONE) for n in parts]
        if any(other != own[0] for other in own):
            raise self.refuse("joins tokens with a value in a fixed order")
        place = self.argument(1, "dim", 0) % self.value.dim()
        return {d + (d >= place): start for d, start in own[0].items()}

    def linear(self) -> Axes:
        if any(self.known.get(n) for n in self.node.all_input_nodes[1:]):
            raise self.refuse("has a weight that runs along the tokens")
        return self.away_from([-1], "multiplies over the tokens")

    def product(self) -> Axes:
        """Batch dimensions broadcast; neither operand is contracted over its tokens."""
        first, second = (0, 1) if self.node.target is not aten.addmm.default else (1, 2)
        (a, left), (b, right) = self.operand(first), self.operand(second)
        if first == 1 and self.known.get(self.node.all_input_nodes[0]):
            raise self.refuse("has a bias that runs along the tokens")
        rank = self.value.dim()
        if a.dim() < 2 or b.dim() < 2:
            raise self.refuse("multiplies vectors")
        left, right = dict(left), dict(right)
        # A sum over all tokens is the same in every order, if both factors have the same one.
        if left.pop(a.dim() - 1, None) != right.pop(b.dim() - 2, None):
            raise self.refuse("multiplies tokens with a value in a fixed order")
        result: dict[int, int] = {}
        for value, own, inner in ((a, left, 2), (b, right, 1)):
            for dim, start in own.items():
                place = rank - inner if dim == value.dim() - inner else dim + rank - value.dim()
                if result.setdefault(place, start) != start:
                    raise self.refuse("joins values whose tokens stand at different places")
        for value, own in ((a, left), (b, right)):
            shift = rank - value.dim()
            for dim in result:
                lies = shift <= dim < rank - 2
                if lies and value.shape[dim - shift] != 1 and dim - shift not in own:
                    raise self.refuse("joins tokens with a value in a fixed order")
        return result

    def norm(self) -> Axes:
        """Normalises over the last dimensions; its weights lie along those."""
        if any(self.known.get(n) for n in self.node.all_input_nodes[1:]):
            raise self.refuse("has a weight that runs along the tokens")
        dims = self.argument(1, "normalized_shape")
        return self.away_from(range(-len(dims), 0), "normalises over the tokens")

    def reduce(self) -> Axes:
        """A sum or an extreme over all tokens is the same in every order."""
        value, own = self.operand(0)
        given = self.argument(1, "dim")
        dims = list(range(value.dim())) if given in (None, []) else given
        dims = [d % value.dim() for d in ([dims] if isinstance(dims, int) else dims)]
        left = {d: start for d, start in own.items() if d not in dims}
        if self.value.dim() == value.dim():
            return left
        return {d - sum(g < d for g in dims): start for d, start in left.items()}

    def pad(self) -> Axes:
        value, _ = self.operand(0)
        widths = self.argument(1, "pad")
        padded = [value.dim() - 1 - k // 2 for k, width in enumerate(widths) if width != 0]
        return self.away_from(padded, "pads the tokens")

    def scatter(self) -> Axes:
        """A value written into a slice of another, along a dimension without tokens."""
        (_, own), (_, source) = self.operand(0), self.operand(1)
        dim = self.argument(2, "dim", 0) % self.value.dim()
        if self.node.target is aten.select_scatter.default:
            source = {d + (d >= dim): start for d, start in source.items()}
        result = source if isinstance(own, _Constant) else own
        if dim in result or (source != result and not isinstance(source, _Constant)):
            raise self.refuse("writes a value in a fixed order among the tokens")
        return result

    def complex_view(self) -> Axes:
        return self.away_from([-1], "pairs tokens")

    def attention(self) -> Axes:
        """Queries keep their order; keys, values and mask share one."""
        q, k, v, mask, _ = attention_operands(self.node)
        rank = self.value.dim()
        if is_causal(self.node):
            raise self.refuse("is causal")
        queries, keys, values = (dict(self.known.get(x, NONE)) for x in (q, k, v))
        if keys != values:
            raise self.refuse("has keys and values in different orders")
        if any(rank - 1 in axes for axes in (queries, keys)):
            raise self.refuse("multiplies over the tokens")
        key_start = keys.pop(rank - 2, None)
        if {d: s for d, s in queries.items() if d != rank - 2} != keys:
            raise self.refuse("has queries and keys in different batches of tokens")
        if isinstance(mask, fx.Node):
            self._check_mask(mask, rank, queries, key_start)
        return queries

    def _check_mask(
        self, mask: fx.Node, rank: int, queries: Mapping[int, int], key_start: int | None
    ) -> None:
        value, own = fake_value(mask), self.known.get(mask, NONE)
        shift = rank - value.dim()
        expected = {d - shift: s for d, s in queries.items() if d >= shift}
        if key_start is not None:
            expected[value.dim() - 1] = key_start
        needed = {d: s for d, s in expected.items() if value.shape[d] != 1}
        if dict(own) != needed:
            raise self.refuse("has a mask in another order")


_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
_STATISTICS = {aten.native_layer_norm.default}
_CONSTANTS = {
    aten.empty.memory_format, aten.empty_like.default, aten.zeros.default, aten.zeros_like.default,
    aten.ones.default, aten.ones_like.default, aten.full.default, aten.full_like.default,
    aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.scalar_tensor.default,
}  # fmt: skip


def _table() -> dict[Any, Callable[[_Step], Axes]]:
    import operator

    families: list[tuple[Callable[[_Step], Axes], tuple[Any, ...]]] = [
        (_Step.same, (
            aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
            aten.contiguous.default, aten.detach.default, aten.alias.default, aten.clone.default,
            aten.dropout.default, aten.type_as.default, aten.real.default,
            aten.softmax.int, aten._softmax.default,  # along the tokens, too
        )),
        (_Step.pointwise, (aten.copy.default, aten.addcmul.default)),
        (_Step.view, (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.flatten.using_ints, aten.unflatten.int,
        )),
        (_Step.expand, (aten.expand.default, aten.expand_as.default)),
        (_Step.permute, (aten.permute.default,)),
        (_Step.transpose, (aten.transpose.int, aten.t.default)),
        (_Step.unsqueeze, (aten.unsqueeze.default,)),
        (_Step.squeeze, (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)),
        (_Step.select, (aten.select.int,)),
        (_Step.part, (aten.slice.Tensor,)),
        (_Step.pieces, tuple(_SPLITS)),
        (_Step.item, (operator.getitem,)),
        (_Step.cat, (aten.cat.default,)),
        (_Step.stack, (aten.stack.default,)),
        (_Step.linear, (aten.linear.default,)),
        (_Step.product, (
            aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default,
        )),
        (_Step.norm, (
            aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default,
        )),
        (_Step.reduce, (
            aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default,
            aten.var.correction, aten.linalg_vector_norm.default,
        )),
        (_Step.pad, (aten.pad.default, aten.constant_pad_nd.default)),
        (_Step.scatter, (aten.slice_scatter.default, aten.select_scatter.default)),
        (_Step.complex_view, (aten.view_as_complex.default, aten.view_as_real.default)),
        (_Step.attention, (aten.scaled_dot_product_attention.default,)),
    ]  # fmt: skip
    return {target: rule for rule, targets in families for target in targets}


_RULES = _table()
