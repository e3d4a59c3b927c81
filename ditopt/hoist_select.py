"""Which nodes of a body are worth computing apart from the rest, once for many calls.

Cutting a body costs fusions, so a value is taken out only where it has to be written to memory
anyway: results of matrix products and attention, what such an operator of the rest reads, and what
the piece hands on. Everything that those are made of comes along. Element-wise work behind them
(a modulation's `1 + scale`) stays, where the compiler fuses it into its reader.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ditopt.dependence import value_inputs, value_users
from ditopt.graph import fake_value, output_nodes, target_name
from ditopt.partition import is_attention, is_matmul
from ditopt.symbols import hint

MIN_ELEMENTS = 1 << 14
"""Element-wise results smaller than this are recomputed; reading them would cost as much."""

_PRODUCTS = {"mm", "addmm", "baddbmm", "einsum", "convolution"}


@dataclass(frozen=True)
class Selection:
    """What leaves one body.

    Attributes:
        group: each node that leaves, with the mask of inputs that its group depends on.
        duplicated: views of them that the rest makes again for itself.
        read: nodes of `group` that the rest reads.
    """

    group: Mapping[fx.Node, int]
    duplicated: frozenset[fx.Node]
    read: tuple[fx.Node, ...]


def is_heavy(node: fx.Node) -> bool:
    """Matrix products, convolutions and attention."""
    if node.op != "call_function":
        return False
    if is_matmul(node) or is_attention(node):
        return True
    return target_name(node.target).split(".")[1:2] in [[name] for name in _PRODUCTS]


def is_view(node: fx.Node) -> bool:
    """Whether the result is, or may be, another look at an operand."""
    if target_name(node.target) == "_operator.getitem":
        return is_view(node.all_input_nodes[0])
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    result, source = fake_value(node), node.all_input_nodes[:1]
    if isinstance(result, torch.Tensor) and source:
        before = fake_value(source[0])
        if isinstance(before, torch.Tensor) and result.dtype != before.dtype:
            return False  # `to` with another dtype makes new values
    return any(value.alias_info is not None for value in node.target._schema.returns)


def elements(node: fx.Node) -> int:
    """Number of elements of a tensor result, by the sizes of the capture."""
    return elements_of(fake_value(node))


def elements_of(value: Any) -> int:
    """Number of elements of a fake tensor, by the sizes of the capture; 0 for other values."""
    return prod(hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else 0


def select(
    gm: fx.GraphModule,
    masks: Mapping[fx.Node, int],
    varying: int,
    required: Collection[int],
    banned: Collection[int],
) -> dict[fx.Node, int]:
    """The nodes of a body that leave it, in order, with their masks.

    Args:
        gm: the body.
        masks: of its nodes, from `find_dependence`.
        varying: the inputs that are new in each call.
        required: positions of outputs that something outside the loop needs.
        banned: masks that are not worth it.
    """
    results = output_nodes(gm)
    wanted = {results[position] for position in required}
    invariant: dict[fx.Node, None] = {}
    rich: set[fx.Node] = set()  # made by a matrix product
    for node in gm.graph.nodes:
        if node.op != "call_function" or masks[node] & varying or masks[node] in banned:
            continue
        if not isinstance(fake_value(node), (torch.Tensor, tuple, list)):
            continue  # sizes: each program works them out
        invariant[node] = None
        if is_heavy(node) or any(source in rich for source in node.all_input_nodes):
            rich.add(node)
    chosen: set[fx.Node] = set()
    todo = [
        node
        for node in invariant
        if node in wanted
        or is_heavy(node)
        or (
            not is_view(node)
            and (node in rich or elements(node) >= MIN_ELEMENTS)
            and _is_stored(node, masks, varying, results)
        )
    ]
    while todo:
        node = todo.pop()
        if node in chosen or node not in invariant:
            continue
        chosen.add(node)
        todo += value_inputs(node)
        if not isinstance(fake_value(node), torch.Tensor):
            todo += node.users  # the parts of a tuple leave with it
    return {node: masks[node] for node in invariant if node in chosen}


def _is_stored(
    node: fx.Node, masks: Mapping[fx.Node, int], varying: int, results: Collection[object]
) -> bool:
    """Whether a value is written to memory in any case, because nothing can be fused with it."""
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current in results:
            return True
        for user in current.users:
            if is_heavy(user) and masks[user] & varying:
                return True
            if is_view(user) and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def sink(group: dict[fx.Node, int]) -> None:
    """Move light nodes that one other group alone reads into that group."""
    for node in reversed(list(group)):
        users = value_users(node)
        readers = {group.get(user) for user in users}
        if is_heavy(node) or len(readers) != 1 or any(user.op == "output" for user in users):
            continue
        (reader,) = readers
        if reader is not None:
            group[node] = reader


def split(
    gm: fx.GraphModule, group: Mapping[fx.Node, int], produced: Collection[fx.Node]
) -> Selection:
    """What the rest of a body reads of the nodes that left it.

    Args:
        gm: the body.
        group: the nodes that leave.
        produced: results of the body that come from there, and not from the rest.
    """
    todo: list[fx.Node] = [
        value for value in output_nodes(gm) if isinstance(value, fx.Node) and value not in produced
    ]
    for node in gm.graph.nodes:
        if node.op == "call_function" and node not in group:
            todo += node.all_input_nodes
    duplicated: set[fx.Node] = set()
    read: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in group or node in duplicated:
            continue
        if is_view(node):
            duplicated.add(node)
            todo += node.all_input_nodes
        else:
            read.add(node)
    return Selection(group, frozenset(duplicated), tuple(n for n in group if n in read))


def root(node: fx.Node) -> fx.Node:
    """What a chain of views looks at."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node
