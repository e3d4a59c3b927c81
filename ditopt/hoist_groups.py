"""Group what leaves the pieces of a model by the inputs that it depends on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from ditopt.dependence import Dependence, find_dependence, value_inputs, value_users
from ditopt.graph import fake_value, output_nodes, placeholders
from ditopt.hoist_select import elements, is_heavy, is_view, root, select, sink, split
from ditopt.runtime.memo import MAX_BYTES

if TYPE_CHECKING:
    from ditopt.capture import Captured

MIN_TOTAL = 1 << 16
"""A group without a matrix product must make at least this many elements."""

MAX_ROWS = 64
"""Matrix products of fewer rows (time embeddings) are not worth a group of their own."""

MAX_LIGHT_BYTES = 1 << 27
"""What a group without a matrix product may keep: masks made anew in each block add up."""


@dataclass(frozen=True)
class Groups:
    """What leaves a model.

    Attributes:
        members: by body key, the nodes that leave, each with the mask of its group's inputs.
        required: by body key, positions of results that another piece's members read.
        classes: the masks, in an order in which each reads from earlier ones only.
    """

    members: Mapping[str, Mapping[fx.Node, int]]
    required: Mapping[str, Collection[int]]
    classes: tuple[int, ...]


@dataclass
class _Class:
    """What is known about all members of one mask: `made` in elements, `kept` in bytes."""

    heavy: int = 0
    rows: int = 0
    made: int = 0
    kept: int = 0
    readers: set[int] = field(default_factory=set)
    rest: bool = False


def find_groups(captured: Captured, varying: Sequence[int], opaque: Collection[int] = ()) -> Groups:
    """Choose what to compute apart, and with what.

    Args:
        captured: the model.
        varying: slots of inputs that are new in each call.
        opaque: slots whose values may come from elsewhere (forecasts).
    """
    dependence = find_dependence(captured, opaque)
    changing = dependence.unknown
    for slot in varying:
        changing |= 1 << slot
    banned: set[int] = set()
    while True:
        members, required = _members(captured, dependence, changing, banned)
        for group in members.values():
            sink(group)
        classes = _classes(captured, members, required)
        into = _merged(classes)
        poor = _poor(classes, into)
        if not poor:
            break
        banned |= poor
    merged = {
        key: {node: into[mask] for node, mask in group.items()} for key, group in members.items()
    }
    return Groups(merged, required, tuple(sorted(set(into.values()), key=int.bit_count)))


def origin(captured: Captured, slot: int, writers: Mapping[int, tuple[int, int]]) -> int:
    """The slot that a slot's value was first written to, before pieces handed it on unchanged."""
    while slot in writers:
        index, position = writers[slot]
        piece = captured.pieces[index]
        result = output_nodes(piece.body.gm)[position]
        if not isinstance(result, fx.Node) or result.op != "placeholder":
            break
        slot = piece.inputs[placeholders(piece.body.gm).index(result)]
    return slot


def writers_of(captured: Captured) -> dict[int, tuple[int, int]]:
    """Piece and position of the result that each slot takes."""
    return {
        slot: (index, position)
        for index, piece in enumerate(captured.pieces)
        for position, slot in enumerate(piece.outputs)
    }


def _members(
    captured: Captured, dependence: Dependence, changing: int, banned: Collection[int]
) -> tuple[dict[str, dict[fx.Node, int]], dict[str, set[int]]]:
    """The nodes that leave each body: pieces must find what they read of earlier ones."""
    writers = writers_of(captured)
    required: dict[str, set[int]] = {key: set() for key in captured.bodies}
    while True:
        members = {
            key: select(body.gm, dependence.nodes[key], changing, required[key], banned)
            for key, body in captured.bodies.items()
        }
        before = sum(map(len, required.values()))
        for piece in captured.pieces:
            for slot in _slots_read(
                piece.inputs, placeholders(piece.body.gm), members[piece.body.key]
            ):
                slot = origin(captured, slot, writers)
                if slot in writers:
                    index, position = writers[slot]
                    required[captured.pieces[index].body.key].add(position)
        if before == sum(map(len, required.values())):
            return members, required


def _slots_read(
    inputs: Sequence[int], sources: Sequence[fx.Node], group: Mapping[fx.Node, int]
) -> list[int]:
    """Slots of the tensors that the members of a piece read."""
    read = {source for node in group for source in value_inputs(node)}
    return [
        slot
        for slot, source in zip(inputs, sources, strict=True)
        if source in read and not is_number(source)
    ]


def is_number(node: fx.Node) -> bool:
    """Whether a value is a size."""
    return not isinstance(fake_value(node), (torch.Tensor, tuple, list))


def _classes(
    captured: Captured,
    members: Mapping[str, Mapping[fx.Node, int]],
    required: Mapping[str, Collection[int]],
) -> dict[int, _Class]:
    found: dict[int, _Class] = defaultdict(_Class)
    for key, body in captured.bodies.items():
        group, times = members[key], sum(p.body.key == key for p in captured.pieces)
        for node, mask in group.items():
            about = found[mask]
            about.readers |= {group[user] for user in value_users(node) if user in group} - {mask}
            if is_heavy(node):
                about.heavy += times
                value = fake_value(node)
                about.rows = max(about.rows, elements(node) // max(1, value.shape[-1]))
            elif not is_view(node):
                about.made += times * elements(node)
        results = [node for node in output_nodes(body.gm) if node in group]
        read = split(body.gm, group, results).read
        for node in read:
            found[group[node]].rest = True
        for node in {*read, *map(root, results)} & group.keys():
            found[group[node]].kept += times * elements(node) * fake_value(node).dtype.itemsize
    _across_pieces(captured, members, found)
    return dict(found)


def _across_pieces(
    captured: Captured,
    members: Mapping[str, Mapping[fx.Node, int]],
    found: Mapping[int, _Class],
) -> None:
    """Note who reads the members that are results of their pieces."""
    writers = writers_of(captured)
    for piece in captured.pieces:
        group = members[piece.body.key]
        for slot, source in zip(piece.inputs, placeholders(piece.body.gm), strict=True):
            slot = origin(captured, slot, writers)
            if slot not in writers:
                continue
            index, position = writers[slot]
            body = captured.pieces[index].body
            result = output_nodes(body.gm)[position]
            mask = members[body.key].get(result)
            if mask is None:
                continue
            for user in value_users(source):
                if user in group:
                    found[mask].readers |= {group[user]} - {mask}
                else:
                    found[mask].rest = True


def _merged(classes: Mapping[int, _Class]) -> dict[int, int]:
    """Which class each joins: every group is one more program and one more look at its inputs.

    A class joins the one class that reads it where it has little to compute.
    """
    into: dict[int, int] = {}
    for mask in sorted(classes, key=int.bit_count, reverse=True):
        about = classes[mask]
        larger = {other for other in classes if other != mask and other & mask == mask}
        readers = {into[reader] for reader in about.readers}
        light = about.heavy == 0
        target = mask
        if len(readers) == 1 and (light or (about.rows <= MAX_ROWS and not about.rest)):
            (target,) = readers
        elif light and not readers and larger:
            target = into[max(larger, key=lambda other: (classes[other].heavy, other))]
        into[mask] = target
    return into


def _poor(classes: Mapping[int, _Class], into: Mapping[int, int]) -> set[int]:
    """Masks whose group is not worth a program, or takes too much memory."""
    poor = set()
    for target in set(into.values()):
        joined = [mask for mask in classes if into[mask] == target]
        readers = {into[r] for mask in joined for r in classes[mask].readers} - {target}
        kept = sum(classes[mask].kept for mask in joined)
        if any(classes[mask].heavy for mask in joined):
            # Two sets at least, for the two branches of guidance.
            bad = kept > MAX_BYTES // 2
        else:
            little = sum(classes[mask].made for mask in joined) < MIN_TOTAL
            bad = kept > MAX_LIGHT_BYTES or (little and not readers)
        if bad:
            poor |= set(joined) | _all_readers(classes, joined)
    return poor


def _all_readers(classes: Mapping[int, _Class], masks: Collection[int]) -> set[int]:
    """Everything that is made of the members of some masks."""
    found: set[int] = set()
    todo = list(masks)
    while todo:
        new = classes[todo.pop()].readers - found
        found |= new
        todo += new
    return found
