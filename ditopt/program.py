"""From a captured model and a plan to the programs that the step runtime runs.

Pieces that share a body and a set of choices share one lowered program. What differs between them
(weights, block lists) is passed in.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from ditopt.assembly import BoundPiece, assemble, function_of
from ditopt.derived import DerivedWeights
from ditopt.errors import PlanError
from ditopt.graph import placeholders
from ditopt.hoist import hoist
from ditopt.hoist_body import SizeInput
from ditopt.join import Extra, Part, join, most_together, spans
from ditopt.passes.base import (
    BlockLists,
    ForcedBlocks,
    FusedWeight,
    LinearOperand,
    NodeDecision,
    RemainderProjection,
    TokenPermutation,
)
from ditopt.piece_choices import PieceChoices
from ditopt.pipeline import PassRunner
from ditopt.report import Decision
from ditopt.runtime.memo import Memo
from ditopt.site_inputs import Choice as SiteChoice
from ditopt.site_inputs import SearchChoice, block_input
from ditopt.sites import AttentionSite, LinearSite, instance_path
from ditopt.stack import find_probe, find_stack
from ditopt.stack_order import order_stack
from ditopt.symbols import evaluator
from ditopt.token_moves import around_stack, describe, site_permutation

if TYPE_CHECKING:
    from ditopt.backends.base import Backend, Lowered
    from ditopt.capture import Captured, Piece
    from ditopt.config import Options
    from ditopt.hoist_rewrite import Group
    from ditopt.infer_layout import Grid
    from ditopt.kernels.block_sparse_attention.dispatch import Choice
    from ditopt.linear_choices import Statistics
    from ditopt.passes.base import PassContext
    from ditopt.quantization import LinearRule
    from ditopt.runtime import InputRoles, Programs
    from ditopt.stack import Stack
    from ditopt.token_order import TokenOrder


@dataclass(frozen=True)
class Phase:
    """The choices of one range of calls.

    By site id: a choice, or the reason why the plan's wish cannot be met.

    Attributes:
        choices: at attention sites.
        linear: at linear sites.
    """

    choices: Mapping[str, SiteChoice | str] = field(default_factory=dict)
    linear: Mapping[str, LinearRule | str] = field(default_factory=dict)


Spec = (
    FusedWeight
    | BlockLists
    | ForcedBlocks
    | SizeInput
    | TokenPermutation
    | RemainderProjection
    | LinearOperand
)


@dataclass(frozen=True)
class Rewritten:
    """One body after the passes: its graph, what its further inputs are, and what was decided."""

    gm: fx.GraphModule
    extras: tuple[Spec, ...]
    decisions: Sequence[tuple[str, NodeDecision]]


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
    """

    captured: Captured
    by_phase: Sequence[Sequence[Sequence[BoundPiece]]]
    stack: Stack | None
    groups: Sequence[Group]
    memos: Sequence[Sequence[Memo]]


class ProgramBuilder:
    """Lowers the pieces of one captured model.

    Attributes:
        decisions: of every pass at every site, filled while building.
        derived: the weights made from the model's own.
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
        self.decisions: list[Decision] = []
        self.derived = DerivedWeights()
        self.programs: dict[Hashable, Lowered] = {}
        self.memos: dict[Hashable, Memo] = {}
        self.memo_pieces: dict[Memo, Sequence[BoundPiece]] = {}
        self.linked: Linked | None = None
        self._device = device
        self._runner = PassRunner(options)
        self._sites = {(site.piece, site.node): site for site in sites}
        self._told: set[tuple[str, str, str]] = set()
        self._rewritten: dict[Hashable, Rewritten] = {}
        self._linears = {(site.piece, site.node): site for site in linears}
        self._statistics = statistics or {}
        self._read: set[int] = set()
        self._moves: tuple[BoundPiece, BoundPiece] | None = None
        self._in_order = range(0)
        self._why_apart = ""
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
            self.decisions += hoisted.decisions
        if order is not None and grid is not None:
            self._order_tokens(order, grid)
        count = len(self.captured.pieces)
        first, end = (stack.first, stack.end) if stack is not None else (count, count)
        kept = {slot for slot in self.captured.outputs if isinstance(slot, int)}
        if stack is not None:
            kept |= {*stack.outputs, *(base for base in stack.bases if base is not None)}
        # Choices differ from block to block, and joined blocks would share hardly any program.
        joins = self.backend.fuses and all(map(self._joins, phases))
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
            self.derived.release(self._read)
        self.linked = Linked(self.captured, by_phase, stack, groups, memos)
        return assemble(self.captured, by_phase, stack, roles, (around, memos), streams)

    def _joins(self, phase: Phase) -> bool:
        """Whether equal pieces stay equal, so that joined ones share programs."""
        seen: dict[str, Mapping[str, LinearRule | str]] = {}
        pieces = enumerate(self.captured.pieces)
        rules = ((p.body.key, self._linear_rules(index, p, phase)) for index, p in pieces)
        return not phase.choices and all(seen.setdefault(key, here) == here for key, here in rules)

    def _linear_rules(self, index: int, piece: Piece, phase: Phase) -> dict[str, LinearRule | str]:
        """Rules of the plan, or reasons against them, by node of a piece."""
        sites = ((n.name, self._linears.get((index, n.name))) for n in piece.body.gm.graph.nodes)
        return {
            node: phase.linear[site.id]
            for node, site in sites
            if site is not None and site.id in phase.linear
        }

    def _bind_section(
        self, section: range, phase: Phase, kept: AbstractSet[int], joins: bool, cut: int
    ) -> tuple[list[BoundPiece], int]:
        """Programs for a range of pieces, none across `cut`, and how many end before that."""
        pieces = self.captured.pieces
        working = [index for index in section if _works(pieces[index])]
        parts = [self._part(index, pieces[index], phase) for index in working]
        later = kept | {slot for piece in pieces[section.stop :] for slot in piece.inputs}
        early = sum(index < cut for index in working)
        between = later | {slot for part in parts[early:] for slot in part.inputs}
        rest = self._bind(parts[early:], later, joins)
        bound = [*self._bind(parts[:early], between, joins), *rest]
        inside = [k for k, index in enumerate(working) if index in self._in_order]
        if self._moves is None or not phase.choices or not inside:
            return bound, len(bound) - len(rest)
        before, behind = self._moves
        first, last = inside[0], inside[-1] + 1
        moved = [*bound[:first], before, *bound[first:last], behind, *bound[last:]]
        return moved, early + (first < early) + (last <= early)

    def _order_tokens(self, order: TokenOrder, grid: Grid) -> None:
        """Find out whether the block stack can run in order; else its attentions reorder."""
        found = order_stack(
            self.captured, find_stack(self.captured), grid, list(self._sites.values())
        )
        if isinstance(found, str):
            self._why_apart = found
            return
        frames, height, width = (int(size) for size in grid)
        self._moves = around_stack(found, order, (frames, height, width), self._device)
        self._in_order = range(found.first, found.end)
        self._why_apart = "it lies outside the block stack"
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
        parts = [self._part(index, piece, phase) for index, piece in group.pieces]
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

    def _part(self, index: int, piece: Piece, phase: Phase) -> Part:
        sites = {node: site for (k, node), site in self._sites.items() if k == index}
        why_apart = None if index in self._in_order else self._why_apart
        chosen = PieceChoices.of(piece.body.gm.graph.nodes, sites, phase.choices, why_apart)
        for node, executor in chosen.executors.items():
            self._decide_executor(sites[node], node, executor)
        own = frozenset(k for k, slot in enumerate(piece.inputs) if self._is_own(slot))
        linear = self._linear_rules(index, piece, phase)
        key = (piece.body.key, chosen.key, frozenset(linear.items()), own)
        if key not in self._rewritten:
            ctx = chosen.context(self.options, linear, own)
            self._rewritten[key] = self._rewrite(piece, ctx)
        done = self._rewritten[key]
        self._tell(piece, index, done.decisions)
        given = zip(piece.inputs, placeholders(done.gm), strict=False)
        self._read.update(slot for slot, node in given if node.users)
        return Part(
            key=key,
            gm=done.gm,
            inputs=piece.inputs,
            outputs=piece.outputs,
            extras=tuple(self._extra(spec, piece, index, chosen.choices) for spec in done.extras),
            kernels=sum(
                isinstance(spec, ForcedBlocks) or (isinstance(spec, BlockLists) and spec.part == 0)
                for spec in done.extras
            ),
        )

    def _rewrite(self, piece: Piece, ctx: PassContext) -> Rewritten:
        gm = fx.GraphModule(piece.body.gm, copy.deepcopy(piece.body.gm.graph))
        decisions = self._runner.run(gm, ctx, piece.path or piece.kind)
        specs = (node.meta.get("ditopt") for node in placeholders(gm))
        return Rewritten(gm, tuple(spec for spec in specs if spec is not None), decisions)

    def _is_own(self, slot: int) -> bool:
        """Whether a slot holds a tensor of the model, not one of the call or from another piece."""
        inputs = self.captured.inputs
        return slot < len(inputs) and inputs[slot].role in ("parameter", "buffer", "constant")

    def _tell(
        self, piece: Piece, index: int, decisions: Sequence[tuple[str, NodeDecision]]
    ) -> None:
        """Record a body's decisions for the piece that runs it, each once."""
        where = piece.path or piece.kind
        nodes = {node.name: node for node in piece.body.gm.graph.nodes}
        for rule, decision in decisions:
            place = (index, decision.node)
            site = self._sites.get(place) or self._linears.get(place)
            node = nodes.get(decision.node)
            name = (
                site.id
                if site is not None
                else (instance_path(self.captured, piece, node) if node is not None else where)
            )
            if (name or where, rule, decision.reason) not in self._told:
                self._told.add((name or where, rule, decision.reason))
                self.decisions.append(
                    Decision(
                        name or where, rule, decision.applied, decision.reason, (decision.node,)
                    )
                )

    def _decide_executor(self, site: AttentionSite, node: str, choice: Choice) -> None:
        """Tell which executor runs a site, once for each reason."""
        if (site.id, "attention_executor", choice.reason) not in self._told:
            self._told.add((site.id, "attention_executor", choice.reason))
            decision = Decision(site.id, "attention_executor", True, choice.reason, (node,))
            self.decisions.append(decision)

    def _extra(
        self,
        spec: Spec,
        piece: Piece,
        index: int,
        choices: Mapping[str, SiteChoice],
    ) -> Extra:
        if isinstance(spec, SizeInput):
            sizes = evaluator(self.captured, (spec.size,))
            return lambda env: sizes(env)[0]
        if isinstance(spec, FusedWeight):
            return self.derived.fused(tuple(piece.inputs[position] for position in spec.positions))
        if isinstance(spec, LinearOperand):
            layer = self._linears[index, spec.node].id
            return self.derived.operand(spec, piece.inputs, self._statistics.get(layer, {}))
        site = self._sites[index, spec.node]
        choice = choices[spec.node]
        if isinstance(spec, TokenPermutation):
            return site_permutation(self.captured, site, choice, self._device, back=spec.inverse)
        assert not isinstance(choice, SearchChoice)  # it has no other inputs
        if isinstance(spec, RemainderProjection):
            assert choice.remainder is not None
            weight = choice.remainder.projection.to(self._device, spec.dtype)
            return lambda env: weight
        part = spec.part if isinstance(spec, BlockLists) else 0
        return block_input(self.captured, site, choice, part, self._device)
