"""One piece of a model with the choices of a plan: rewritten by the passes, its inputs named.

Pieces that share a body and a set of choices share one rewritten graph. What differs between them
(weights, block lists) becomes a further input of the part.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from ditopt.derived import DerivedWeights
from ditopt.graph import placeholders
from ditopt.hoist_body import SizeInput
from ditopt.join import Extra, Part
from ditopt.passes.base import (
    BlockBias,
    BlockLists,
    DroppedBlocks,
    ForcedBlocks,
    FusedWeight,
    LinearOperand,
    NodeDecision,
    PlaceOrder,
    RemainderProjection,
    SelectorSlot,
    TokenPermutation,
)
from ditopt.piece_choices import PieceChoices
from ditopt.pipeline import PassRunner
from ditopt.report import Decision
from ditopt.site_inputs import (
    BlockInput,
    DenseChoice,
    LinearPart,
    SearchChoice,
    block_input,
    every_block,
    slot_input,
)
from ditopt.site_inputs import Choice as SiteChoice
from ditopt.sites import AttentionSite, LinearSite, instance_path
from ditopt.symbols import evaluator
from ditopt.token_moves import site_permutation
from ditopt.token_order import TokenMajor

if TYPE_CHECKING:
    from ditopt.capture import Captured, Piece
    from ditopt.config import Options
    from ditopt.kernels.block_sparse_attention.dispatch import Choice
    from ditopt.linear_choices import Statistics
    from ditopt.passes.base import PassContext
    from ditopt.quantization import LinearRule


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
    | DroppedBlocks
    | BlockBias
    | SelectorSlot
    | PlaceOrder
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


class PartMaker:
    """Rewrites the pieces of one captured model.

    Attributes:
        captured: the model; replaced when work is hoisted out of it.
        sites: attentions by piece and node.
        decisions: of every pass at every site, each once.
        derived: the weights made from the model's own.
        read: slots that some part reads.
        in_order: pieces whose tokens are in the plan's order already.
        why_apart: why those of the others are not.
    """

    def __init__(
        self,
        captured: Captured,
        sites: Sequence[AttentionSite],
        linears: Sequence[LinearSite],
        options: Options,
        device: Any,
        statistics: Statistics,
    ) -> None:
        self.captured = captured
        self.sites = {(site.piece, site.node): site for site in sites}
        self.decisions: list[Decision] = []
        self.derived = DerivedWeights()
        self.read: set[int] = set()
        self.in_order = range(0)
        self.why_apart = ""
        self._linears = {(site.piece, site.node): site for site in linears}
        self._options = options
        self._device = device
        self._statistics = statistics
        self._runner = PassRunner(options)
        self._told: set[tuple[str, str, str]] = set()
        self._rewritten: dict[Hashable, Rewritten] = {}

    def alike(self, phase: Phase) -> bool:
        """Whether equal pieces stay equal in a phase, so that joined ones share programs."""
        seen: dict[str, Mapping[str, LinearRule | str]] = {}
        pieces = enumerate(self.captured.pieces)
        rules = ((p.body.key, self._linear_rules(index, p, phase)) for index, p in pieces)
        return not phase.choices and all(seen.setdefault(key, here) == here for key, here in rules)

    def make(self, index: int, piece: Piece, phase: Phase) -> Part:
        """The piece at `index` with the choices of a phase."""
        sites = {node: site for (k, node), site in self.sites.items() if k == index}
        why_apart = None if index in self.in_order else self.why_apart
        chosen = PieceChoices.of(piece.body.gm.graph.nodes, sites, phase.choices, why_apart)
        for node, executor in chosen.executors.items():
            self._decide_executor(sites[node], node, executor)
        own = frozenset(k for k, slot in enumerate(piece.inputs) if self._is_own(slot))
        linear = self._linear_rules(index, piece, phase)
        key = (piece.body.key, chosen.key, frozenset(linear.items()), own)
        if key not in self._rewritten:
            ctx = chosen.context(self._options, linear, own)
            self._rewritten[key] = self._rewrite(piece, ctx)
        done = self._rewritten[key]
        self._tell(piece, index, done.decisions)
        given = zip(piece.inputs, placeholders(done.gm), strict=False)
        self.read.update(slot for slot, node in given if node.users)
        return Part(
            key=key,
            gm=done.gm,
            inputs=piece.inputs,
            outputs=piece.outputs,
            extras=tuple(self._extra(spec, piece, index, chosen.choices) for spec in done.extras),
            kernels=len({spec.node for spec in done.extras if isinstance(spec, _LISTED)}),
        )

    def _linear_rules(self, index: int, piece: Piece, phase: Phase) -> dict[str, LinearRule | str]:
        """Rules of the plan, or reasons against them, by node of a piece."""
        sites = ((n.name, self._linears.get((index, n.name))) for n in piece.body.gm.graph.nodes)
        return {
            node: phase.linear[site.id]
            for node, site in sites
            if site is not None and site.id in phase.linear
        }

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
            site = self.sites.get(place) or self._linears.get(place)
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
        if isinstance(spec, SelectorSlot):
            return slot_input()
        site = self.sites[index, spec.node]
        choice = choices[spec.node]
        if isinstance(choice, DenseChoice):
            assert isinstance(spec, BlockLists)  # it has no other inputs
            return every_block(self.captured, site, choice, spec.part, self._device)
        if isinstance(spec, PlaceOrder):
            places = replace(choice, order=TokenMajor())
            return site_permutation(self.captured, site, places, self._device, back=False)
        if isinstance(spec, TokenPermutation):
            return site_permutation(self.captured, site, choice, self._device, back=spec.inverse)
        assert not isinstance(choice, SearchChoice)  # it has no other inputs
        if isinstance(spec, RemainderProjection):
            assert isinstance(choice.remainder, LinearPart)
            weight = choice.remainder.projection.to(self._device, spec.dtype)
            return lambda env: weight
        return block_input(self.captured, site, choice, _wanted(spec), self._device)


_LISTED = (BlockLists, ForcedBlocks, SelectorSlot)
"""Inputs of attentions with block lists: each has one of these kinds at least."""


def _wanted(spec: BlockLists | ForcedBlocks | DroppedBlocks | BlockBias) -> BlockInput:
    match spec:
        case BlockLists():
            return "ids" if spec.part else "counts"
        case ForcedBlocks():
            return "forced"
        case DroppedBlocks():
            return "dropped"
        case BlockBias():
            return "bias"
