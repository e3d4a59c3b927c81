"""Take groups of nodes out of the pieces of a captured model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ditopt.capture import Body, Captured, Input, Piece
from ditopt.graph import fake_value
from ditopt.hoist_body import SplitBody
from ditopt.hoist_groups import Groups, origin, writers_of
from ditopt.hoist_select import elements_of
from ditopt.report import Decision
from ditopt.runtime.memo import BY_VALUE

if TYPE_CHECKING:
    from torch import fx

    from ditopt.stack import Stack


@dataclass(frozen=True)
class Group:
    """Pieces that depend on the same inputs of a call.

    Attributes:
        name: those inputs, for messages.
        in_stack: whether its results are read in the block stack, which a skipped step leaves out.
        inputs: slots of those inputs.
        weights: slots of the parameters and buffers that it reads.
        pieces: each with the index of the piece that it was taken out of.
        outputs: slots that others read.
    """

    name: str
    in_stack: bool
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    pieces: tuple[tuple[int, Piece], ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Hoisted:
    """A captured model without its loop-invariant parts.

    Attributes:
        captured: the rest; its inputs end with those of role "hoisted", filled by the groups.
        stack: the block stack in the rest's slots.
        groups: in an order in which each finds what it reads.
    """

    captured: Captured
    stack: Stack | None
    groups: tuple[Group, ...] = ()
    decisions: tuple[Decision, ...] = ()


Value = tuple["int", "fx.Node"]
"""A node of the body of the piece with this index."""


class Rewriter:
    """Makes the pieces of the groups and of the rest, and numbers the slots between them.

    Slots of the result: the inputs and constants of the captured model, the values that groups give
    to the rest or to each other, the other slots of the captured model, the values within a group.
    """

    def __init__(self, captured: Captured, stack: Stack | None, groups: Groups) -> None:
        self.captured = captured
        self.stack = stack
        self.groups = groups
        self._writers = writers_of(captured)
        self._in_stack = range(stack.first, stack.end) if stack is not None else range(0)
        self._returned = {slot for slot in captured.outputs if isinstance(slot, int)}
        self._bodies = {key: self._split(key, body) for key, body in captured.bodies.items()}
        shared = self._shared()
        self._shift = len(shared)
        given = len(captured.inputs)
        self._slots: dict[Value, int] = {v: given + number for number, v in enumerate(shared)}
        self._moved: dict[int, int] = {}  # slots of the captured model that a group now writes
        self._total = captured.slots + self._shift
        for index, piece in enumerate(captured.pieces):
            body = self._bodies[piece.body.key]
            for node in body.exported:
                if (index, node) not in self._slots:
                    self._slots[index, node] = self._total
                    self._total += 1
            for slot, node in zip(piece.outputs, body.results, strict=True):
                if node in body.produced:
                    self._moved[slot] = self._slots[index, node]

    def run(self) -> Hoisted:
        """The rest, the groups, and a decision for each."""
        captured, pieces = self.captured, self.captured.pieces
        first = len(captured.inputs)
        hoisted = [value for value, slot in self._slots.items() if slot < first + self._shift]
        rest = replace(
            captured,
            inputs=(*captured.inputs, *(self._input(*value) for value in hoisted)),
            pieces=tuple(self._rest(index, piece) for index, piece in enumerate(pieces)),
            outputs=tuple(self._own(s) if isinstance(s, int) else s for s in captured.outputs),
            slots=self._total,
        )
        found = [
            self._group(in_stack, mask)
            for in_stack in (False, True)
            for mask in self.groups.classes
        ]
        groups = tuple(group for group in found if group.pieces)
        decisions = tuple(self._decision(group, rest) for group in groups)
        return Hoisted(rest, self._new_stack(), groups, decisions)

    def _split(self, key: str, body: Body) -> SplitBody:
        """One body with what all pieces that share it have in common."""
        pieces = [piece for piece in self.captured.pieces if piece.body.key == key]
        given = len(self.captured.inputs)
        return SplitBody(
            body,
            self.groups.members[key],
            required=self.groups.required[key],
            returned={
                position
                for piece in pieces
                for position, slot in enumerate(piece.outputs)
                if slot in self._returned
            },
            computed={
                position
                for piece in pieces
                for position, slot in enumerate(piece.inputs)
                if origin(self.captured, slot, self._writers) >= given
            },
        )

    def _shared(self) -> list[Value]:
        """The values that leave their group, in order."""
        shared: dict[Value, None] = {}
        readers = self._readers()
        for index, piece in enumerate(self.captured.pieces):
            body = self._bodies[piece.body.key]
            section = index in self._in_stack
            for node in body.exported:
                own = (section, body.members[node])
                inside = {(section, mask) for mask in body.readers(node)}
                slots = {
                    slot
                    for slot, result in zip(piece.outputs, body.results, strict=True)
                    if result is node and node in body.produced
                }
                outside = {reader for slot in slots for reader in readers.get(slot, ())}
                if node in body.read or (inside | outside) - {own}:
                    shared[index, node] = None
        return list(shared)

    def _readers(self) -> dict[int, set[tuple[bool, int] | None]]:
        """Who reads each slot between pieces: groups, and None for the rest."""
        readers: dict[int, set[tuple[bool, int] | None]] = {}
        for index, piece in enumerate(self.captured.pieces):
            body = self._bodies[piece.body.key]
            for slot, source in zip(piece.inputs, body.sources, strict=True):
                first = origin(self.captured, slot, self._writers)
                for mask in body.readers(source):
                    readers.setdefault(first, set()).add((index in self._in_stack, mask))
                if body.rest_reads(source):
                    readers.setdefault(slot, set()).add(None)
        if self.stack is not None:
            for bound in (*self.stack.outputs, *self.stack.bases):
                if bound is not None:
                    readers.setdefault(bound, set()).add(None)
        return readers

    def _own(self, slot: int) -> int:
        """The new number of a slot that the rest still writes, or that is an input."""
        return slot if slot < len(self.captured.inputs) else slot + self._shift

    def _new(self, slot: int) -> int:
        """Where a reader of a slot of the captured model now finds its value."""
        return self._moved.get(slot, self._own(slot))

    def _rest(self, index: int, piece: Piece) -> Piece:
        body = self._bodies[piece.body.key]
        if not body.members:
            return replace(
                piece,
                inputs=tuple(self._new(slot) for slot in piece.inputs),
                outputs=tuple(self._own(slot) for slot in piece.outputs),
            )
        positions, results = body.rest_inputs, body.rest_results
        return replace(
            piece,
            body=body.rest,
            inputs=(
                *(self._new(piece.inputs[position]) for position in positions),
                *(self._slots[index, node] for node in body.read),
            ),
            outputs=tuple(self._own(piece.outputs[position]) for position in results),
        )

    def _group(self, in_stack: bool, mask: int) -> Group:
        captured = self.captured
        pieces = []
        for index, piece in enumerate(captured.pieces):
            body = self._bodies[piece.body.key]
            if mask not in body.masks or (index in self._in_stack) != in_stack:
                continue
            part = body.part(mask)
            slots = [origin(captured, piece.inputs[p], self._writers) for p in part.inputs]
            inputs = (
                *(self._new(slot) for slot in slots),
                *(self._slots[index, node] for node in part.crossing),
            )
            outputs = tuple(self._slots[index, node] for node in part.results)
            pieces.append((index, Piece(piece.kind, piece.path, part.body, inputs, outputs)))
        read = {slot for _, piece in pieces for slot in piece.inputs}
        users = {slot: name for name, slot in captured.user_inputs.items() if mask >> slot & 1}
        given = len(captured.inputs)
        return Group(
            name=", ".join(users.values()),
            in_stack=in_stack,
            inputs=tuple(users),
            weights=tuple(
                slot
                for slot in sorted(read)
                if slot < given and captured.inputs[slot].role in ("parameter", "buffer")
            ),
            pieces=tuple(pieces),
            outputs=tuple(
                slot for _, piece in pieces for slot in piece.outputs if slot < given + self._shift
            ),
        )

    def _input(self, index: int, node: fx.Node) -> Input:
        piece = self.captured.pieces[index]
        return Input(f"{piece.path or piece.kind}.{node.name}", "hoisted", fake_value(node))

    def _new_stack(self) -> Stack | None:
        stack = self.stack
        if stack is None:
            return None
        return replace(
            stack,
            outputs=tuple(
                self._own(slot) if slot in self._returned else self._new(slot)
                for slot in stack.outputs
            ),
            bases=tuple(None if slot is None else self._new(slot) for slot in stack.bases),
            sizes=tuple(self._own(slot) for slot in stack.sizes),
        )

    def _decision(self, group: Group, rest: Captured) -> Decision:
        size = sum(_bytes(rest.inputs[slot].fake) for slot in group.outputs)
        depends = f"on {group.name} only" if group.name else "on weights only"
        blocks = len(group.pieces)
        reason = (
            f"{len(group.outputs)} values of {blocks} {'part' if blocks == 1 else 'parts'} depend "
            f"{depends}: computed once and kept, {size / 1e6:.1f} MB for each set of inputs"
        )
        fakes = [rest.inputs[slot].fake for slot in group.inputs]
        if any(not fake.is_cpu and elements_of(fake) <= BY_VALUE for fake in fakes):
            # A timestep of the same value may come as another tensor; reading it would wait.
            reason += " (known by their memory: values on an accelerator are not read)"
        return Decision("model", "hoist", True, reason)


def _bytes(value: Any) -> int:
    return elements_of(value) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
