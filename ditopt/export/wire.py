"""From a linked model to the wiring of an engine: slots renumbered, weights by name.

In the linked model weights are inputs like any other. In an engine they are stored tensors that
the programs which use them share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from ditopt.errors import EngineError
from ditopt.export.borders import without_unused_inputs
from ditopt.export.moves import move_program
from ditopt.export.recorder import Recorded
from ditopt.export.wiring import Kept, Probe, StackRecord, Step, Wiring
from ditopt.graph import placeholders
from ditopt.stack import slot_value
from ditopt.token_moves import TokenMove

if TYPE_CHECKING:
    from ditopt.assembly import BoundPiece
    from ditopt.program import Linked, ProgramBuilder


@dataclass
class Wired:
    """What is to be stored.

    Attributes:
        wiring: how the programs make up a call.
        graphs: of the distinct programs, in the wiring's order.
        tensors: weights, derived weights and block lists by name.
    """

    wiring: Wiring
    graphs: list[fx.GraphModule] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Wirer:
    """Reads a `ProgramBuilder` that has built its programs with a `RecordingBackend`.

    Args:
        builder: its `linked` is what is stored.
        values: of the captured model's inputs, those of role `constant` left out.
    """

    def __init__(self, builder: ProgramBuilder, values: Sequence[Any]) -> None:
        assert builder.linked is not None
        self._builder = builder
        self._linked: Linked = builder.linked
        captured = self._linked.captured
        self._env = [*values, *captured.constants]
        self._env += [None] * (len(captured.inputs) - len(self._env))
        users = [k for k, item in enumerate(captured.inputs) if item.role == "user"]
        hoisted = [k for k, item in enumerate(captured.inputs) if item.role == "hoisted"]
        self._hoisted = len(hoisted)
        self._slots: dict[Hashable, int] = {slot: k for k, slot in enumerate((*users, *hoisted))}
        self._first = len(users) + len(hoisted)
        self._graphs: dict[int, int] = {}  # id of what a piece calls -> index
        self._indices: dict[int, list[Tensor]] = {}  # id of a TokenMove -> what it selects
        self._moved: dict[int, int] = {}  # slots that entered the blocks in order -> their slots
        self._wired: list[fx.GraphModule] = []
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._derived: dict[Any, Tensor] = {}

    def run(self) -> Wired:
        """The wiring and everything that it names."""
        linked = self._linked
        before, _, after = linked.by_phase[0]
        memos = list(dict.fromkeys(memo for phase in linked.memos for memo in phase))
        kept = tuple(
            Kept(
                inputs=tuple(self._slot(slot) for slot in group.inputs),
                outputs=tuple(self._slot(slot) for slot in group.outputs),
                steps=self._steps(self._builder.memo_pieces[memo]),
            )
            for memo, group in self._groups().items()
        )
        always = [m for m, g in self._groups().items() if not g.in_stack]
        wiring = Wiring(
            slots=0,
            hoisted=self._hoisted,
            before=self._steps(before),
            bodies=tuple(self._body(body) for _, body, _ in linked.by_phase),
            after=self._steps(after),
            kept=kept,
            kept_always=tuple(memos.index(memo) for memo in always if memo in linked.memos[0]),
            kept_by_phase=tuple(
                tuple(memos.index(memo) for memo in phase) for phase in linked.memos
            ),
            stack=self._stack(),
            probe=self._probe(),
            returned=tuple(self._returned()),
        )
        slots = 1 + max((*self._slots.values(), self._first - 1), default=0)
        return Wired(wiring.model_copy(update={"slots": slots}), self._wired, self._tensors)

    def _groups(self) -> dict[Any, Any]:
        """Each memo with its group, in order of first use."""
        return {
            memo: group
            for phase in self._linked.memos
            for memo, group in zip(phase, self._linked.groups, strict=True)
        }

    def _stack(self) -> StackRecord | None:
        stack = self._linked.stack
        if stack is None:
            return None
        if stack.sizes:
            raise EngineError("a size crosses the block stack; engines have fixed shapes")
        return StackRecord(
            outputs=tuple(self._slot(slot) for slot in stack.outputs),
            bases=tuple(None if base is None else self._slot(base) for base in stack.bases),
        )

    def _probe(self) -> Probe | None:
        if self._linked.probe is None:
            return None
        cuts, streams = self._linked.probe
        slots = (
            (self._slot(slot), None if base is None else self._slot(base)) for slot, base in streams
        )
        return Probe(cuts=tuple(cuts), streams=tuple(slots))

    def _returned(self) -> list[int]:
        found = []
        for item in self._linked.captured.outputs:
            if isinstance(item, int):
                found.append(self._slot(item))
            elif item[1] is not None:
                raise EngineError(f"the model returns the constant {item[1]!r}")
        return found

    def _slot(self, slot: Hashable) -> int:
        if slot not in self._slots:
            self._slots[slot] = len(self._slots)
        return self._slots[slot]

    def _steps(self, pieces: Sequence[BoundPiece]) -> tuple[Step, ...]:
        return tuple(self._step(piece) for piece in pieces)

    def _body(self, pieces: Sequence[BoundPiece]) -> tuple[Step, ...]:
        """A block stack; where its tokens are in order, what enters is read in its moved form."""
        steps = []
        for piece in pieces:
            if isinstance(piece.call, TokenMove):
                steps.append(self._move(piece, piece.call))
            else:
                steps.append(self._step(piece))
        self._moved.clear()
        return tuple(steps)

    def _move(self, piece: BoundPiece, move: TokenMove) -> Step:
        """A program that selects along tokens, its indices stored tensors.

        What enters the blocks gets slots of its own: stored tensors and the caller's stay as they
        are. What leaves them is put back in place.
        """
        values = [
            (slot, axes)
            for slot, axes in zip(piece.inputs, move.axes, strict=True)
            if not (move.back and slot in self._moved)
        ]
        captured = self._linked.captured
        if id(move) not in self._graphs:
            fakes = [slot_value(captured, slot) for slot, _ in values]
            gm, self._indices[id(move)] = move_program(fakes, [a for _, a in values], move.index)
            self._graphs[id(move)] = len(self._wired)
            self._wired.append(gm)
        inputs = [self._source(slot, {}) for slot, _ in values]
        names = enumerate(self._indices[id(move)])
        inputs += [self._store(f"order.{self._graphs[id(move)]}.{k}", x) for k, x in names]
        # Behind the blocks what entered them is read as it was.
        self._moved = {} if move.back else {s: self._slot(("moved", s)) for s, _ in values}
        outputs = (self._moved.get(slot, self._slot(slot)) for slot, _ in values)
        return Step(program=self._graphs[id(move)], inputs=tuple(inputs), outputs=tuple(outputs))

    def _step(self, piece: BoundPiece) -> Step:
        assert isinstance(piece.call, Recorded)
        extras = dict(piece.extras)
        if id(piece.call) not in self._graphs:
            self._graphs[id(piece.call)] = len(self._wired)
            self._wired.append(without_unused_inputs(piece.call.gm))
        used = [bool(node.users) for node in placeholders(piece.call.gm)]
        inputs = tuple(
            self._source(slot, extras)
            for slot, reads in zip(piece.inputs, used, strict=True)
            if reads
        )
        return Step(
            program=self._graphs[id(piece.call)],
            inputs=inputs,
            outputs=tuple(self._slot(slot) for slot in piece.outputs),
            free=tuple(self._slot(slot) for slot in piece.free)
            + tuple(self._moved[slot] for slot in piece.free if slot in self._moved),
            kernels=piece.kernels,
        )

    def _source(self, slot: int, extras: dict[int, Any]) -> int | str:
        if slot in self._moved:
            return self._moved[slot]
        if slot in extras:
            extra = extras[slot]
            if extra not in self._derived:
                self._derived[extra] = extra(self._env)
            return self._store(f"derived.{len(self._tensors)}", self._derived[extra])
        inputs = self._linked.captured.inputs
        if slot < len(inputs) and inputs[slot].role in ("parameter", "buffer", "constant"):
            return self._store(inputs[slot].name, self._env[slot])
        return self._slot(slot)

    def _store(self, name: str, value: Any) -> str:
        """The name under which a tensor is stored; the same data is stored once."""
        if not isinstance(value, Tensor):
            raise EngineError(f"{name}: a {type(value).__name__} is no tensor to store")
        # Those that are stored are alive, so that their addresses are theirs.
        key: tuple[Any, ...] = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() == 0:
            key = (name, *key)
        if key not in self._names:
            self._names[key] = name
            self._tensors[name] = value.detach()
        return self._names[key]
