"""From a captured model and a plan to the programs that the step runtime runs.

Pieces that share a body and a set of choices share one lowered program. What differs between them (weights, block lists) is passed in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import fx

from ditopt.backends.base import Backend, Lowered
from ditopt.capture import Captured, Piece
from ditopt.config import Options
from ditopt.graph import placeholders
from ditopt.infer_layout import Grid, SiteGeometry
from ditopt.passes.base import BlockLists, FusedWeight, NodeDecision, PassContext, SparseChoice
from ditopt.patterns import HeadPattern, block_lists
from ditopt.pipeline import PassRunner
from ditopt.report import Decision
from ditopt.runtime import InputRoles, Programs, count
from ditopt.sites import AttentionSite, instance_path
from ditopt.stack import Stack, slot_value
from ditopt.symbols import evaluator
from ditopt.weights import FusedTensor

Extra = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class HeadChoice:
    """What one phase of a plan asks for at one attention site: a pattern per head, on the site's part of the token grid."""

    patterns: tuple[HeadPattern, ...]
    geometry: SiteGeometry
    grid: Grid
    block_q: int
    block_k: int


@dataclass(frozen=True)
class Phase:
    """The choices of one range of calls: by site id, a `HeadChoice`, or the reason why the plan's wish cannot be met."""

    choices: Mapping[str, HeadChoice | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lowering:
    """One lowered variant of a body: the callable, and what its further inputs are."""

    call: Lowered
    extras: tuple[FusedWeight | BlockLists, ...]
    kernels: int


@dataclass(frozen=True)
class BoundPiece:
    """A piece with its program: arguments are `env[i]` for the slots, then the extras; `free` slots are not read again;
    `kernels` is the number of block-sparse attentions in it."""

    call: Lowered
    inputs: tuple[int, ...]
    extras: tuple[Extra, ...]
    outputs: tuple[int, ...]
    free: tuple[int, ...]
    kernels: int


class ProgramBuilder:
    """Lowers the pieces of one captured model.

    Attributes:
        decisions: of every pass at every site, filled while building.
        fused: the derived weights, for invalidation.
        program_keys: the distinct (body, choices) pairs that were lowered.
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
        self.program_keys: dict[tuple[str, frozenset[str], frozenset[str]], Lowering] = {}
        self._device = device
        self._runner = PassRunner(options)
        self._sites = {(site.piece, site.node): site for site in sites}
        self._told: set[tuple[str, str, str]] = set()
        self._made: dict[
            tuple[str, frozenset[str], frozenset[str]], list[tuple[str, NodeDecision]]
        ] = {}
        self._weights: dict[tuple[int, tuple[int, ...]], FusedTensor] = {}

    def build(self, phases: Sequence[Phase], stack: Stack | None, roles: InputRoles) -> Programs:
        """Programs with one version of the block stack for each phase."""
        count = len(self.captured.pieces)
        first, end = (stack.first, stack.end) if stack is not None else (count, count)
        kept = set(stack.bases if stack is not None else ()) - {None}
        everything = range(count)
        by_phase = [[self._bind(index, phase, kept) for index in everything] for phase in phases]
        return _assemble(self.captured, by_phase, first, end, stack, roles)

    def _bind(self, index: int, phase: Phase, kept: set[Any]) -> BoundPiece:
        piece = self.captured.pieces[index]
        sparse: dict[str, HeadChoice] = {}
        declined: dict[str, str] = {}
        for node in piece.body.gm.graph.nodes:
            site = self._sites.get((index, node.name))
            choice = phase.choices.get(site.id) if site is not None else None
            if isinstance(choice, HeadChoice):
                sparse[node.name] = choice
            elif isinstance(choice, str):
                declined[node.name] = choice
        lowering = self._lower(piece, index, sparse, declined)
        extras = tuple(self._extra(spec, piece, index, sparse) for spec in lowering.extras)
        return BoundPiece(
            lowering.call,
            piece.inputs,
            extras,
            piece.outputs,
            self._dead_after(index, kept),
            lowering.kernels,
        )

    def _lower(
        self,
        piece: Piece,
        index: int,
        sparse: Mapping[str, HeadChoice],
        declined: Mapping[str, str],
    ) -> Lowering:
        key = (piece.body.key, frozenset(sparse), frozenset(declined))
        where = piece.path or piece.kind
        if key not in self.program_keys:
            gm = fx.GraphModule(piece.body.gm, copy.deepcopy(piece.body.gm.graph))
            ctx = PassContext(
                options=self.options,
                sparse={
                    node: self._sparse_choice(index, node, choice)
                    for node, choice in sparse.items()
                },
                declined=declined,
            )
            made = self._runner.run(gm, ctx, where)
            extras = tuple(
                n.meta["ditopt"] for n in placeholders(gm) if n.meta.get("ditopt") is not None
            )
            kernels = sum(isinstance(spec, BlockLists) and spec.part == 0 for spec in extras)
            self.program_keys[key] = Lowering(
                self.backend.lower(gm, self.options.inductor), extras, kernels
            )
            self._made[key] = made
        nodes = {node.name: node for node in piece.body.gm.graph.nodes}
        for rule, decision in self._made[key]:
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
        return self.program_keys[key]

    def _sparse_choice(self, index: int, node: str, choice: HeadChoice) -> SparseChoice:
        site = self._sites[index, node]
        return SparseChoice(
            choice.block_q, choice.block_k, len(choice.patterns), site.tokens_q, site.tokens_k
        )

    def _extra(
        self,
        spec: FusedWeight | BlockLists,
        piece: Piece,
        index: int,
        sparse: Mapping[str, HeadChoice],
    ) -> Extra:
        if isinstance(spec, FusedWeight):
            slots = tuple(piece.inputs[position] for position in spec.positions)
            if (index, slots) not in self._weights:
                fused = FusedTensor(slots, release=self.options.release_weights)
                self._weights[index, slots] = fused
                self.fused.append(fused)
            return self._weights[index, slots].get
        return self._lists(spec.part, sparse[spec.node], self._sites[index, spec.node])

    def _lists(self, part: int, choice: HeadChoice, site: AttentionSite) -> Extra:
        """The site's block lists at the sizes of each call; equal sizes give the same tensors."""
        sizes = evaluator(self.captured, (*choice.grid, site.tokens_q, site.tokens_k))

        @lru_cache(maxsize=64)
        def make(frames: int, height: int, width: int, tokens_q: int, tokens_k: int) -> Any:
            layout = choice.geometry.layout((frames, height, width), tokens_q)
            return block_lists(
                choice.patterns,
                layout,
                tokens_q,
                tokens_k,
                choice.block_q,
                choice.block_k,
                self._device,
            )[part]

        return lambda env: make(*sizes(env))

    def _dead_after(self, index: int, kept: set[Any]) -> tuple[int, ...]:
        """Intermediate slots whose last reader is this piece; freeing them returns activation memory."""
        pieces = self.captured.pieces
        later = {slot for piece in pieces[index + 1 :] for slot in piece.inputs}
        later |= {slot for slot in self.captured.outputs if isinstance(slot, int)} | kept
        first_free = len(self.captured.inputs)
        touched = (*pieces[index].inputs, *pieces[index].outputs)
        return tuple(sorted({slot for slot in touched if slot >= first_free and slot not in later}))


def _run(pieces: Sequence[BoundPiece], env: list[Any]) -> None:
    for piece in pieces:
        results = piece.call(
            *[env[i] for i in piece.inputs], *[extra(env) for extra in piece.extras]
        )
        for slot, value in zip(piece.outputs, results, strict=True):
            env[slot] = value
        for slot in piece.free:
            env[slot] = None
        for _ in range(piece.kernels):
            count("block_sparse_attention")


def _assemble(
    captured: Captured,
    by_phase: Sequence[Sequence[BoundPiece]],
    first: int,
    end: int,
    stack: Stack | None,
    roles: InputRoles,
) -> Programs:
    """Close over the environment: inputs, constants, then one slot for each value that passes between pieces."""
    constants = list(captured.constants)
    spare = [None] * (captured.slots - len(captured.inputs))
    stack_outputs = stack.outputs if stack is not None else ()
    bases = stack.bases if stack is not None else ()
    sizes = stack.sizes if stack is not None else ()
    measure = evaluator(captured, [slot_value(captured, slot) for slot in sizes])
    carried = tuple(dict.fromkeys(base for base in bases if base is not None))
    before, after = by_phase[0][:first], by_phase[0][end:]
    bodies = [pieces[first:end] for pieces in by_phase]
    returned = captured.outputs

    def head(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        env = [*inputs, *constants, *spare]
        _run(before, env)
        for slot, size in zip(sizes, measure(env), strict=True):
            env[slot] = size
        return [env[slot] for slot in carried], env

    def body(inputs: Sequence[Any], carry: Sequence[Any], env: list[Any], phase: int) -> list[Any]:
        _run(bodies[phase], env)
        return [env[slot] for slot in stack_outputs]

    def tail(inputs: Sequence[Any], outputs: Sequence[Any], env: list[Any]) -> tuple[Any, ...]:
        for slot, value in zip(stack_outputs, outputs, strict=True):
            env[slot] = value
        _run(after, env)
        return tuple(env[item] if isinstance(item, int) else item[1] for item in returned)

    base = tuple(None if slot is None else carried.index(slot) for slot in bases)
    return Programs(head, body, tail, base, roles)
