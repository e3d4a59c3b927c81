"""From a captured model and a plan to the programs that the step runtime runs.

Parts of equal key share one lowered program; consecutive ones are joined where that is faster.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditopt.assembly import BoundPiece, assemble, function_of
from ditopt.errors import PlanError
from ditopt.hoist import hoist
from ditopt.join import Extra, Part, join, most_together, spans
from ditopt.part_maker import PartMaker, Phase
from ditopt.report import Decision
from ditopt.runtime.memo import Memo
from ditopt.stack import find_probe, find_stack
from ditopt.stack_order import order_stack
from ditopt.token_moves import around_stack, describe

if TYPE_CHECKING:
    from ditopt.backends.base import Backend, Lowered
    from ditopt.capture import Captured, Piece
    from ditopt.config import Options
    from ditopt.hoist_rewrite import Group
    from ditopt.infer_layout import Grid
    from ditopt.linear_choices import Statistics
    from ditopt.runtime import InputRoles, Programs
    from ditopt.sites import AttentionSite, LinearSite
    from ditopt.stack import Stack
    from ditopt.token_order import TokenOrder

_CUDA_GRAPHS = "triton.cudagraphs"


def _works(piece: Piece) -> bool:
    """Whether anything was left in a piece when the loop-invariant part was taken out."""
    called = (node.op == "call_function" for node in piece.body.gm.graph.nodes)
    return bool(piece.outputs) or any(called)


@dataclass(frozen=True)
class Linked:
    """A lowered model before it becomes one callable.

    Attributes:
        captured, stack: without what was hoisted out of the denoising loop.
        by_phase: for each phase the programs before, in and after the block stack.
        groups: what was hoisted.
        memos: for each phase, what keeps the results of each group.
        probe: what runs before a gate decides, as `assembly.assemble` takes it; None without.
    """

    captured: Captured
    by_phase: Sequence[Sequence[Sequence[BoundPiece]]]
    stack: Stack | None
    groups: Sequence[Group]
    memos: Sequence[Sequence[Memo]]
    probe: tuple[Sequence[int], Sequence[tuple[int, int | None]]] | None


class ProgramBuilder:
    """Lowers the pieces of one captured model.

    Attributes:
        parts: rewrites the pieces.
        decisions, derived: of `parts`, filled while building.
        programs: what was lowered, by the key of the part.
        memos: what keeps the values that were hoisted out of the denoising loop.
        memo_pieces: the programs that fill each memo.
        linked: what `build` put together, for an engine to store.
    """

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[AttentionSite],
        backend: Backend,
        options: Options,
        device: Any,
        linears: Sequence[LinearSite] = (),
        statistics: Statistics | None = None,
    ) -> None:
        self.captured = captured
        self.backend = backend
        self.options = options
        self.parts = PartMaker(captured, sites, linears, options, device, statistics or {})
        self.decisions = self.parts.decisions
        self.derived = self.parts.derived
        self.programs: dict[Hashable, Lowered] = {}
        self.memos: dict[Hashable, Memo] = {}
        self.memo_pieces: dict[Memo, Sequence[BoundPiece]] = {}
        self.linked: Linked | None = None
        self._device = device
        self._moves: tuple[BoundPiece, BoundPiece] | None = None
        self._extra_slots: dict[Extra, int] = {}  # they follow the slots of the captured model

    def build(
        self,
        phases: Sequence[Phase],
        stack: Stack | None,
        roles: InputRoles,
        varying: Sequence[int] | None = None,
        order: TokenOrder | None = None,
        grid: Grid | None = None,
        probe: int = 0,
    ) -> Programs:
        """Programs with one version of the block stack for each phase.

        Args:
            phases: choices by range of calls.
            stack: the block stack, where calls skip it or differ in it.
            roles: what the inputs mean to a sampling run.
            varying: slots of the inputs that are new in each call; what does not depend on them is
                hoisted out of the denoising loop. None hoists nothing.
            order: of the tokens in the block stack, where any phase chooses something.
            grid: of the tokens.
            probe: number of first blocks of the stack that run before a gate decides.

        Raises:
            PlanError: the stack has no more blocks than these.
        """
        groups: Sequence[Group] = ()
        if varying is not None and self.options.hoist:
            hoisted = hoist(self.captured, stack, varying)
            self.captured, stack, groups = hoisted.captured, hoisted.stack, hoisted.groups
            self.parts.captured = self.captured
            self.decisions += hoisted.decisions
        if order is not None and grid is not None:
            self._order_tokens(order, grid)
        count = len(self.captured.pieces)
        first, end = (stack.first, stack.end) if stack is not None else (count, count)
        kept = {slot for slot in self.captured.outputs if isinstance(slot, int)}
        if stack is not None:
            kept |= {*stack.outputs, *(base for base in stack.bases if base is not None)}
        # Choices differ from block to block, and joined blocks would share hardly any program.
        joins = self.backend.fuses and all(map(self.parts.alike, phases))
        sections = (range(first), range(first, end), range(end, count))
        found = None if stack is None or not probe else find_probe(self.captured, stack, probe)
        if isinstance(found, str):
            raise PlanError(f"cache.gate.blocks: {found}")
        cut = found.end if found is not None else first
        by_phase, cuts = [], []
        for phase in phases:
            made = [self._bind_section(section, phase, kept, joins, cut) for section in sections]
            by_phase.append([bound for bound, _ in made])
            cuts.append(made[1][1])
        streams = None if found is None else (cuts, found.streams)
        memos = [
            [self._memo(group, phase if group.in_stack else phases[0], joins) for group in groups]
            for phase in phases
        ]
        around = [memo for memo, group in zip(memos[0], groups, strict=True) if not group.in_stack]
        if self.options.release_weights:
            self.derived.release(self.parts.read)
        self.linked = Linked(self.captured, by_phase, stack, groups, memos, streams)
        return assemble(self.captured, by_phase, stack, roles, (around, memos), streams)

    def _bind_section(
        self, section: range, phase: Phase, kept: AbstractSet[int], joins: bool, cut: int
    ) -> tuple[list[BoundPiece], int]:
        """Programs for a range of pieces, none across `cut`, and how many end before that."""
        pieces = self.captured.pieces
        working = [index for index in section if _works(pieces[index])]
        parts = [self.parts.make(index, pieces[index], phase) for index in working]
        later = kept | {slot for piece in pieces[section.stop :] for slot in piece.inputs}
        early = sum(index < cut for index in working)
        between = later | {slot for part in parts[early:] for slot in part.inputs}
        rest = self._bind(parts[early:], later, joins)
        bound = [*self._bind(parts[:early], between, joins), *rest]
        inside = [k for k, index in enumerate(working) if index in self.parts.in_order]
        if self._moves is None or not phase.choices or not inside:
            return bound, len(bound) - len(rest)
        before, behind = self._moves
        first, last = inside[0], inside[-1] + 1
        moved = [*bound[:first], before, *bound[first:last], behind, *bound[last:]]
        return moved, early + (first < early) + (last <= early)

    def _order_tokens(self, order: TokenOrder, grid: Grid) -> None:
        """Find out whether the block stack can run in order; else its attentions reorder."""
        found = order_stack(
            self.captured, find_stack(self.captured), grid, list(self.parts.sites.values())
        )
        if isinstance(found, str):
            self.parts.why_apart = found
            return
        frames, height, width = (int(size) for size in grid)
        self._moves = around_stack(found, order, (frames, height, width), self._device)
        self.parts.in_order = range(found.first, found.end)
        self.parts.why_apart = "it lies outside the block stack"
        ends = (self.captured.pieces[found.first].path, self.captured.pieces[found.end - 1].path)
        reason = describe(found, order, *ends)
        self.decisions.append(Decision("model", "reorder_tokens", True, reason))

    def _bind(
        self, parts: Sequence[Part], kept: AbstractSet[int], joins: bool, *, graphs: bool = True
    ) -> list[BoundPiece]:
        """Programs for consecutive parts; something after them reads the slots in `kept`."""
        most = most_together(parts) if joins else 0
        single = [range(k, k + 1) for k in range(len(parts))]
        bound = []
        for span in spans([part.key for part in parts], most) if joins else single:
            later = kept | {slot for part in parts[span.stop :] for slot in part.inputs}
            part = join([parts[k] for k in span], later)
            if part.key not in self.programs:
                self.programs[part.key] = self.backend.lower(part.gm, self._inductor(graphs))
            extras = tuple((self._slot_of(extra), extra) for extra in part.extras)
            bound.append(
                BoundPiece(
                    self.programs[part.key],
                    (*part.inputs, *(slot for slot, _ in extras)),
                    extras,
                    part.outputs,
                    self._dead(part, later),
                    part.kernels,
                )
            )
        return bound

    def _memo(self, group: Group, phase: Phase, joins: bool) -> Memo:
        """What keeps the results of a group; phases in which it does the same share it."""
        parts = [self.parts.make(index, piece, phase) for index, piece in group.pieces]
        key = (group.in_stack, group.inputs, tuple(part.key for part in parts))
        if key not in self.memos:
            pieces = self._bind(parts, set(group.outputs), joins, graphs=False)
            memo = self.memos[key] = Memo(
                function_of(pieces, group.outputs),
                inputs=(*group.inputs, *self._symbols()),
                weights=group.weights,
                outputs=group.outputs,
                device=self._device,
            )
            self.memo_pieces[memo] = pieces
        return self.memos[key]

    def _symbols(self) -> list[int]:
        return [slot for slot, item in enumerate(self.captured.inputs) if item.role == "symbol"]

    def _inductor(self, graphs: bool) -> Mapping[str, Any]:
        """Inductor's options; what is kept may not lie in memory that a CUDA graph writes to."""
        options = self.options.inductor
        return options if graphs else {k: v for k, v in options.items() if k != _CUDA_GRAPHS}

    def _slot_of(self, extra: Extra) -> int:
        return self._extra_slots.setdefault(extra, self.captured.slots + len(self._extra_slots))

    def _dead(self, part: Part, later: AbstractSet[int]) -> tuple[int, ...]:
        """Intermediate slots whose last reader is this part: freeing them returns memory."""
        first_free = len(self.captured.inputs)
        touched = {*part.inputs, *part.outputs}
        return tuple(sorted(slot for slot in touched - later if slot >= first_free))
