"""Putting tokens in order, as a program: the linked model does it between its programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def move_program(
    values: Sequence[Tensor],
    axes: Sequence[tuple[tuple[int, int], ...]],
    index: Callable[[int, int], Tensor],
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph that selects tokens along some dimensions of each value, strides kept.

    Args:
        values: fake tensors; the program's first inputs and, moved, its outputs.
        axes: for each value its dimensions along tokens, and where the grid starts along each.
        index: what to select along a dimension of a length where the grid starts at a place.

    Returns:
        The program, and the tensors that are its further inputs.
    """
    graph = fx.Graph()
    inputs = [_input(graph, f"value_{k}", value) for k, value in enumerate(values)]
    wanted = dict.fromkeys(
        (int(value.shape[dim]), start)
        for value, own in zip(values, axes, strict=True)
        for dim, start in own
    )
    indices = {key: index(*key) for key in wanted}
    nodes = {k: _input(graph, f"index_{n}", x) for n, (k, x) in enumerate(indices.items())}
    outputs = []
    for node, value, own in zip(inputs, values, axes, strict=True):
        moved = node
        for dim, start in own:
            chosen = nodes[int(value.shape[dim]), start]
            moved = graph.call_function(aten.index_select.default, (moved, dim, chosen))
        if not value.is_contiguous():  # as what index_select gives is
            sizes, strides = ([int(n) for n in each] for each in (value.shape, value.stride()))
            options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            empty = graph.call_function(aten.empty_strided.default, (sizes, strides), options)
            moved = graph.call_function(aten.copy.default, (empty, moved))
        moved.meta["val"] = value
        outputs.append(moved)
    graph.output(tuple(outputs))
    return fx.GraphModule({}, graph), list(indices.values())


def _input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node
