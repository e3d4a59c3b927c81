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

from ditopt.assembly import BoundPiece, assemble
from ditopt.graph import placeholders
from ditopt.join import Extra, Part, join, spans
from ditopt.passes.base import (
    BlockLists,
    ForcedBlocks,
    FusedWeight,
    NodeDecision,
    OnlineChoice,
    PassContext,
    SparseChoice,
)
from ditopt.pipeline import PassRunner
from ditopt.report import Decision
from ditopt.site_inputs import HeadChoice, SelectorChoice, block_input
from ditopt.sites import AttentionSite, instance_path
from ditopt.weights import FusedTensor

if TYPE_CHECKING:
    from ditopt.backends.base import Backend, Lowered
    from ditopt.capture import Captured, Piece
    from ditopt.config import Options
    from ditopt.runtime import InputRoles, Programs
    from ditopt.stack import Stack


@dataclass(frozen=True)
class Phase:
    """The choices of one range of calls.

    By site id: a choice, or the reason why the plan's wish cannot be met.
    """

    choices: Mapping[str, HeadChoice | SelectorChoice | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewritten:
    """One body after the passes: its graph, what its further inputs are, and what was decided."""

    gm: fx.GraphModule
    extras: tuple[FusedWeight | BlockLists | ForcedBlocks, ...]
    decisions: Sequence[tuple[str, NodeDecision]]


class ProgramBuilder:
    """Lowers the pieces of one captured model.

    Attributes:
        decisions: of every pass at every site, filled while building.
        fused: the derived weights, for invalidation.
        programs: what was lowered, by the key of the part.
    """

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[AttentionSite],
        backend: Backend,
        options: Options,
        device: Any,
    ) -> None:
        self.captured = captured
        self.backend = backend
        self.options = options
        self.decisions: list[Decision] = []
        self.fused: list[FusedTensor] = []
        self.programs: dict[Hashable, Lowered] = {}
        self._device = device
        self._runner = PassRunner(options)
        self._sites = {(site.piece, site.node): site for site in sites}
        self._told: set[tuple[str, str, str]] = set()
        self._rewritten: dict[Hashable, Rewritten] = {}
        self._weights: dict[tuple[int, tuple[int, ...]], FusedTensor] = {}
        self._extra_slots: dict[Extra, int] = {}  # they follow the slots of the captured model

    def build(self, phases: Sequence[Phase], stack: Stack | None, roles: InputRoles) -> Programs:
        """Programs with one version of the block stack for each phase."""
        count = len(self.captured.pieces)
        first, end = (stack.first, stack.end) if stack is not None else (count, count)
        kept = {slot for slot in self.captured.outputs if isinstance(slot, int)}
        if stack is not None:
            kept |= {*stack.outputs, *(base for base in stack.bases if base is not None)}
        # Choices differ from block to block, and joined blocks would share hardly any program.
        joins = self.backend.fuses and not any(phase.choices for phase in phases)
        sections = (range(first), range(first, end), range(end, count))
        by_phase = [
            [self._bind_section(section, phase, kept, joins) for section in sections]
            for phase in phases
        ]
        return assemble(self.captured, by_phase, stack, roles)

    def _bind_section(
        self, section: range, phase: Phase, kept: AbstractSet[int], joins: bool
    ) -> list[BoundPiece]:
        parts = [self._part(index, phase) for index in section]
        single = [range(k, k + 1) for k in range(len(parts))]
        bound = []
        for span in spans([part.key for part in parts]) if joins else single:
            last = section[span[-1]]
            later = kept | {s for piece in self.captured.pieces[last + 1 :] for s in piece.inputs}
            part = join([parts[k] for k in span], later)
            if part.key not in self.programs:
                self.programs[part.key] = self.backend.lower(part.gm, self.options.inductor)
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

    def _slot_of(self, extra: Extra) -> int:
        return self._extra_slots.setdefault(extra, self.captured.slots + len(self._extra_slots))

    def _dead(self, part: Part, later: AbstractSet[int]) -> tuple[int, ...]:
        """Intermediate slots whose last reader is this part: freeing them returns memory."""
        first_free = len(self.captured.inputs)
        touched = {*part.inputs, *part.outputs}
        return tuple(sorted(slot for slot in touched - later if slot >= first_free))

    def _part(self, index: int, phase: Phase) -> Part:
        piece = self.captured.pieces[index]
        sparse: dict[str, HeadChoice] = {}
        online: dict[str, SelectorChoice] = {}
        declined: dict[str, str] = {}
        for node in piece.body.gm.graph.nodes:
            site = self._sites.get((index, node.name))
            choice = phase.choices.get(site.id) if site is not None else None
            if isinstance(choice, HeadChoice):
                sparse[node.name] = choice
            elif isinstance(choice, SelectorChoice):
                online[node.name] = choice
            elif isinstance(choice, str):
                declined[node.name] = choice
        own = frozenset(k for k, slot in enumerate(piece.inputs) if self._is_own(slot))
        # A selector's rule is written into the program; lists and patterns are passed in.
        rules = frozenset((node, choice.selector) for node, choice in online.items())
        key = (piece.body.key, frozenset(sparse), rules, frozenset(declined), own)
        if key not in self._rewritten:
            self._rewritten[key] = self._rewrite(piece, index, sparse, online, declined, own)
        done = self._rewritten[key]
        self._tell(piece, index, done.decisions)
        return Part(
            key=key,
            gm=done.gm,
            inputs=piece.inputs,
            outputs=piece.outputs,
            extras=tuple(
                self._extra(spec, piece, index, {**sparse, **online}) for spec in done.extras
            ),
            kernels=sum(
                isinstance(spec, ForcedBlocks) or (isinstance(spec, BlockLists) and spec.part == 0)
                for spec in done.extras
            ),
        )

    def _rewrite(
        self,
        piece: Piece,
        index: int,
        sparse: Mapping[str, HeadChoice],
        online: Mapping[str, SelectorChoice],
        declined: Mapping[str, str],
        own: frozenset[int],
    ) -> Rewritten:
        gm = fx.GraphModule(piece.body.gm, copy.deepcopy(piece.body.gm.graph))
        ctx = PassContext(
            options=self.options,
            sparse={
                node: self._sparse_choice(index, node, choice) for node, choice in sparse.items()
            },
            online={
                node: self._online_choice(index, node, choice) for node, choice in online.items()
            },
            declined=declined,
            own=own,
        )
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
            site = self._sites.get((index, decision.node))
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

    def _sparse_choice(self, index: int, node: str, choice: HeadChoice) -> SparseChoice:
        site = self._sites[index, node]
        return SparseChoice(
            choice.block_q, choice.block_k, len(choice.patterns), site.tokens_q, site.tokens_k
        )

    def _online_choice(self, index: int, node: str, choice: SelectorChoice) -> OnlineChoice:
        site = self._sites[index, node]
        rule, amount = choice.selector.rule
        blocks = (choice.block_q, choice.block_k)
        sizes = (site.heads, site.tokens_q, site.tokens_k)
        return OnlineChoice(rule, amount, choice.selector.minimum, *blocks, *sizes)

    def _extra(
        self,
        spec: FusedWeight | BlockLists | ForcedBlocks,
        piece: Piece,
        index: int,
        choices: Mapping[str, HeadChoice | SelectorChoice],
    ) -> Extra:
        if isinstance(spec, FusedWeight):
            slots = tuple(piece.inputs[position] for position in spec.positions)
            if (index, slots) not in self._weights:
                fused = FusedTensor(slots, release=self.options.release_weights)
                self._weights[index, slots] = fused
                self.fused.append(fused)
            return self._weights[index, slots].get
        part = spec.part if isinstance(spec, BlockLists) else 0
        site = self._sites[index, spec.node]
        return block_input(self.captured, site, choices[spec.node], part, self._device)
