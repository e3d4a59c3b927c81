"""Cut one body into the parts that leave it and the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from ditopt.capture import Body
from ditopt.dependence import only_casts, value_inputs
from ditopt.graph import fake_value, output_nodes, placeholders
from ditopt.hoist_groups import is_number
from ditopt.hoist_select import is_view, root, split

aten = torch.ops.aten


@dataclass(frozen=True)
class SizeInput:
    """A further input of a program: a size that follows from the symbolic sizes of the call."""

    size: Any


@dataclass(frozen=True)
class Part:
    """What one group takes out of a body.

    Attributes:
        body: its graph: an input for each of `inputs`, for each of `crossing`, then sizes.
        inputs: positions of the inputs of the whole body.
        crossing: what it reads of other groups.
        results: what it returns.
    """

    body: Body
    inputs: tuple[int, ...]
    crossing: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


class SplitBody:
    """One body, the nodes that leave it, and what is left.

    Args:
        body: it stays as it is.
        members: the nodes that leave, each with the mask of its group.
        required: positions of results that members of other bodies read.
        returned: positions of results that the caller gets and may write into.
        computed: positions of inputs that are no inputs of the call.

    Attributes:
        results: the body's results.
        produced: those that groups write in place of the rest.
        read: members that the rest reads.
        exported: members that anyone reads.
    """

    def __init__(
        self,
        body: Body,
        members: Mapping[fx.Node, int],
        *,
        required: Collection[int],
        returned: Collection[int],
        computed: Collection[int],
    ) -> None:
        self.body = body
        self.members = members
        self.masks = set(members.values())
        self.sources = placeholders(body.gm)
        self.results = output_nodes(body.gm)
        self._returned = returned
        self._computed = computed
        self.produced = {
            node
            for position, node in enumerate(self.results)
            if node in members and (position in required or root(node) in members)
        }
        kept = {self.results[position] for position in returned}
        self._taken = {mask: self._nodes_of(mask) for mask in self.masks}
        selection = split(body.gm, members, self.produced - kept)
        self.read = selection.read
        self._duplicated = selection.duplicated
        self.exported = tuple(
            node
            for node in members
            if node in self.produced or node in selection.read or self.readers(node)
        )

    def _nodes_of(self, mask: int) -> tuple[list[fx.Node], set[fx.Node]]:
        """What the part of one group computes, with views of other groups' values, and reads."""
        taken = {node for node, own in self.members.items() if own == mask}
        read: set[fx.Node] = set()
        todo = list(taken)
        while todo:
            for source in value_inputs(todo.pop()):
                if source in taken:
                    continue
                if source in self.members and is_view(source):
                    taken.add(source)
                    todo.append(source)
                else:
                    read.add(source)
        return [node for node in self.members if node in taken], read

    def readers(self, node: fx.Node) -> set[int]:
        """Masks of the groups that read a node of another group, or an input."""
        return {mask for mask, (_, read) in self._taken.items() if node in read}

    def rest_reads(self, source: fx.Node) -> bool:
        """Whether the rest reads an input of the body."""
        return self.sources.index(source) in self.rest_inputs

    @cached_property
    def rest_results(self) -> tuple[int, ...]:
        """Positions of the results that the rest still gives."""
        return tuple(
            position
            for position, node in enumerate(self.results)
            if node not in self.produced or position in self._returned
        )

    @cached_property
    def _rest_nodes(self) -> list[fx.Node]:
        return [
            node
            for node in self.body.gm.graph.nodes
            if node.op == "call_function" and (node not in self.members or node in self._duplicated)
        ]

    @cached_property
    def rest_inputs(self) -> tuple[int, ...]:
        """Positions of the inputs that the rest still reads; sizes stay, for the compiler."""
        read = {source for node in self._rest_nodes for source in node.all_input_nodes}
        read |= {self.results[position] for position in self.rest_results}
        return tuple(
            position
            for position, source in enumerate(self.sources)
            if source in read or is_number(source)
        )

    @cached_property
    def rest(self) -> Body:
        """What is left: an input for each of `rest_inputs`, then for each of `read`."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for source in (*(self.sources[position] for position in self.rest_inputs), *self.read):
            values[source] = _add_input(graph, source)
        self._copy(graph, values, self._rest_nodes)
        graph.output(tuple(self._result(graph, values, p) for p in self.rest_results))
        key = f"{self.body.key} without what was hoisted"
        return Body(key, fx.GraphModule(self.body.gm, graph), self.body.path)

    def _result(self, graph: fx.Graph, values: Mapping[fx.Node, fx.Node], position: int) -> Any:
        """A result of the rest; what the caller may write into is no kept value itself."""
        node = self.results[position]
        if not isinstance(node, fx.Node):
            return node
        if position not in self._returned or root(node) not in self.members:
            return values[node]
        clone = graph.call_function(aten.clone.default, (values[node],))
        clone.meta["val"] = fake_value(node)
        return clone

    def part(self, mask: int) -> Part:
        """What the group with this mask takes; equal for all pieces that share the body."""
        if mask not in self._parts:
            self._parts[mask] = self._make_part(mask)
        return self._parts[mask]

    @cached_property
    def _parts(self) -> dict[int, Part]:
        return {}

    def _make_part(self, mask: int) -> Part:
        nodes, read = self._taken[mask]
        positions = tuple(
            position
            for position, source in enumerate(self.sources)
            if position not in self._computed or not is_number(source)
            if source in read or is_number(source)
        )
        given = {self.sources[position] for position in positions}
        crossing = tuple(node for node in self.members if node in read)
        sizes = [n for n in self.body.gm.graph.nodes if n in read - given and is_number(n)]
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for source in (*(self.sources[position] for position in positions), *crossing):
            values[source] = _add_input(graph, source)
        for size in sizes:
            values[size] = _add_input(graph, size)
            values[size].meta["ditopt"] = SizeInput(fake_value(size))
        self._copy(graph, values, nodes)
        results = tuple(node for node in self.exported if self.members[node] == mask)
        graph.output(tuple(values[node] for node in results))
        graph.eliminate_dead_code()  # views that only others read
        key = f"{self.body.key} of {mask:b}"
        gm = fx.GraphModule(self.body.gm, graph)
        return Part(Body(key, gm, self.body.path), positions, crossing, results)

    def _copy(
        self, graph: fx.Graph, values: dict[fx.Node, fx.Node], nodes: Sequence[fx.Node]
    ) -> None:
        """Add `nodes` to `graph`, and the attributes of the body that they read."""
        for node in nodes:
            for source in value_inputs(node):
                if source.op == "get_attr" and source not in values:
                    values[source] = graph.node_copy(source)
            if only_casts(node) and node.all_input_nodes[-1] not in values:
                dtype = fake_value(node).dtype
                source = values[node.all_input_nodes[0]]
                cast = graph.call_function(aten.to.dtype, (source, dtype))
                cast.meta = dict(node.meta)
                values[node] = cast
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])


def _add_input(graph: fx.Graph, source: fx.Node) -> fx.Node:
    node = graph.placeholder(source.name)
    node.meta = {key: value for key, value in source.meta.items() if key != "ditopt"}
    return node
