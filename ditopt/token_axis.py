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
from typing import Any

import torch
from torch import fx

from ditopt.graph import fake_value, output_nodes, placeholders
from ditopt.sites import SDPA, attention_operands, is_causal
from ditopt.token_rules import CONSTANT, NONE, SPLITS, Axes, Constant, Mixes, Step

aten = torch.ops.aten


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


class _Step(Step):
    """One node with the rules of arithmetic beside those of `token_rules`."""

    def axes(self) -> Axes:
        marked = [n for n in self.node.all_input_nodes if self.known.get(n)]
        if self.node.target in _CONSTANTS:
            return CONSTANT
        if not marked:
            constant = [isinstance(self.known.get(n), Constant) for n in self.tensor_inputs()]
            return CONSTANT if constant and all(constant) else NONE
        rule = _RULES.get(self.node.target)
        if rule is None and torch.Tag.pointwise in getattr(self.node.target, "tags", ()):
            rule = _Step.pointwise
        if rule is None:
            raise Mixes(f"{self.name} has no rule")
        return rule(self)

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
        (_Step.pieces, tuple(SPLITS)),
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
