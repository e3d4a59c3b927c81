"""Where tokens lie in the result of an operator that moves, joins or splits values.

See `token_axis`: the axes of a value are its dimensions along grid tokens, with the place where the
tokens start along each. Each rule gives the axes of a node's result from those of its operands, or
raises `Mixes` where the result would depend on the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.graph import fake_value

aten = torch.ops.aten

Axes = Mapping[int, int]
"""Dimension -> where the grid's tokens start along it."""

aten = torch.ops.aten
NONE: Axes = {}


class Mixes(Exception):
    """The graph does something to tokens that depends on their order; the message says what."""


class Constant(dict[int, int]):
    """Axes of a value that is the same everywhere (zeros): it takes part in any order."""


CONSTANT: Axes = Constant()

SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
STATISTICS = {aten.native_layer_norm.default}


class Step:
    """One node: its operands with their axes, and the rules."""

    def __init__(self, node: fx.Node, axes: Mapping[fx.Node, Axes], tokens: int) -> None:
        self.node = node
        self.known = axes
        self.tokens = tokens
        self.value = fake_value(node)
        self.name = str(node.target)

    def tensor_inputs(self) -> list[fx.Node]:
        """The operands that are tensors."""
        return [n for n in self.node.all_input_nodes if isinstance(fake_value(n), Tensor)]

    def operand(self, position: int) -> tuple[Any, Axes]:
        """Fake value and axes of a positional argument."""
        node: Any = self.node.args[position]
        return fake_value(node), self.known.get(node, NONE)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the operator, however it was passed."""
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)

    def refuse(self, what: str) -> Mixes:
        """The reason, with the operator's name."""
        return Mixes(f"{self.name} {what}")

    def pointwise(self) -> Axes:
        """Broadcast from the right; every operand with an extent has the same axis there."""
        return self.together(self.tensor_inputs())

    def together(self, operands: Sequence[fx.Node]) -> Axes:
        """Axes of values that broadcast against each other."""
        rank = self.value.dim()
        result: dict[int, int] = {}
        for node in operands:
            shift = rank - fake_value(node).dim()
            for dim, start in self.known.get(node, NONE).items():
                if result.setdefault(dim + shift, start) != start:
                    raise self.refuse("joins values whose tokens stand at different places")
        for node in operands:
            value, own = fake_value(node), self.known.get(node, NONE)
            if isinstance(own, Constant):
                continue
            shift = rank - value.dim()
            for dim in result:
                if dim >= shift and value.shape[dim - shift] != 1 and dim - shift not in own:
                    raise self.refuse("joins tokens with a value in a fixed order")
        return result

    def same(self) -> Axes:
        """The first operand's."""
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
        """New dimensions stand before the others."""
        value, own = self.operand(0)
        return {dim + self.value.dim() - value.dim(): start for dim, start in own.items()}

    def permute(self) -> Axes:
        """Axes move with their dimensions."""
        value, own = self.operand(0)
        order = [d % value.dim() for d in self.argument(1, "dims")]
        return {order.index(dim): start for dim, start in own.items()}

    def transpose(self) -> Axes:
        """Two dimensions change places."""
        value, own = self.operand(0)
        rank = value.dim()
        if self.node.target is aten.t.default:
            first, second = 0, rank - 1
        else:
            first, second = (self.argument(k, f"dim{k - 1}") % rank for k in (1, 2))
        swap = {first: second, second: first}
        return {swap.get(dim, dim): start for dim, start in own.items()}

    def unsqueeze(self) -> Axes:
        """A dimension of extent 1 is put in."""
        place = self.argument(1, "dim") % self.value.dim()
        return {dim + (dim >= place): start for dim, start in self.operand(0)[1].items()}

    def squeeze(self) -> Axes:
        """Dimensions of extent 1 go; the tokens have more."""
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
        """One index of a dimension without tokens."""
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
        """Places `first` to `last` of a dimension with tokens."""
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
        if source.target in STATISTICS:
            return own  # mean and deviation keep the dimensions, with extent 1 where they reduce
        if source.target not in SPLITS:
            raise self.refuse(f"takes a result of {source.target}")
        whole = fake_value(source.args[0])
        inner = Step(source, self.known, self.tokens)
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
            if isinstance(own, Constant):
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
        """All parts have the same axes."""
        parts: Any = self.node.args[0]
        own = [self.known.get(n, NONE) for n in parts]
        if any(other != own[0] for other in own):
            raise self.refuse("joins tokens with a value in a fixed order")
        place = self.argument(1, "dim", 0) % self.value.dim()
        return {d + (d >= place): start for d, start in own[0].items()}

    def pad(self) -> Axes:
        """Padding stands at dimensions without tokens."""
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
        result = source if isinstance(own, Constant) else own
        if dim in result or (source != result and not isinstance(source, Constant)):
            raise self.refuse("writes a value in a fixed order among the tokens")
        return result

    def complex_view(self) -> Axes:
        """Pairs of channels become complex numbers, or back."""
        return self.away_from([-1], "pairs tokens")
