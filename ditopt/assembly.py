"""Lowered pieces and the environment between them, as the three programs of the step runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ditopt.runtime import Programs, count
from ditopt.stack import slot_value
from ditopt.symbols import evaluator

if TYPE_CHECKING:
    from ditopt.backends.base import Lowered
    from ditopt.capture import Captured
    from ditopt.join import Extra
    from ditopt.runtime import InputRoles
    from ditopt.runtime.memo import Memo
    from ditopt.stack import Stack


@dataclass(frozen=True)
class BoundPiece:
    """A part of the model with its program.

    Attributes:
        call: the program; its arguments are `env[i]` for each of `inputs`.
        inputs, outputs: slots of the environment.
        extras: slot, among the last of `inputs`, and what fills it from the call's arguments.
        free: slots that nothing reads after this part.
        kernels: number of block-sparse attentions in it.
    """

    call: Lowered
    inputs: tuple[int, ...]
    extras: tuple[tuple[int, Extra], ...]
    outputs: tuple[int, ...]
    free: tuple[int, ...]
    kernels: int


def run_pieces(pieces: Sequence[BoundPiece], env: list[Any]) -> None:
    """Run programs in order; each reads its inputs from `env` and writes its outputs there."""
    for piece in pieces:
        results = piece.call(*[env[i] for i in piece.inputs])
        for slot, value in zip(piece.outputs, results, strict=True):
            env[slot] = value
        for slot in piece.free:
            env[slot] = None
        for _ in range(piece.kernels):
            count("block_sparse_attention")


Strides = dict[tuple[int, torch.Size], tuple[int, ...]]


def _with_strides(position: int, value: Any, seen: Strides) -> Any:
    """The output at `position` of the block stack with the strides that the stack itself gives it.

    The programs behind were made for those; a forecast has the strides of its base, which may be
    a transposed view (a patch embedding).
    """
    if not isinstance(value, torch.Tensor):
        return value
    wanted = seen.get((position, value.shape), value.stride())
    if value.stride() == wanted:
        return value
    moved = torch.empty_strided(value.shape, wanted, dtype=value.dtype, device=value.device)
    return moved.copy_(value)


def assemble(
    captured: Captured,
    by_phase: Sequence[Sequence[Sequence[BoundPiece]]],
    stack: Stack | None,
    roles: InputRoles,
    memos: tuple[Sequence[Memo], Sequence[Sequence[Memo]]],
    probe: tuple[Sequence[int], Sequence[tuple[int, int | None]]] | None = None,
) -> Programs:
    """Close over the environment.

    Its slots: inputs, constants, hoisted values, then one for each value between pieces, then the
    extras. `by_phase` holds what runs before, in and after the block stack; `memos` fill the
    hoisted values, first those of a skip call, then those of the phases. `probe` says how many
    programs of each phase's block stack run before a gate decides, and which slots are its streams
    and their bases.
    """
    constants = list(captured.constants)
    given = len(captured.inputs)
    spare = [None] * (captured.slots - given)
    stack_outputs = stack.outputs if stack is not None else ()
    bases = stack.bases if stack is not None else ()
    sizes = stack.sizes if stack is not None else ()
    measure = evaluator(captured, [slot_value(captured, slot) for slot in sizes])
    carried = tuple(dict.fromkeys(base for base in bases if base is not None))
    before, _, after = by_phase[0]
    bodies = [stretch for _, stretch, _ in by_phase]
    cuts, streams = probe if probe is not None else ([0] * len(bodies), ())
    remainders = [stretch[cut:] for stretch, cut in zip(bodies, cuts, strict=True)]
    returned = captured.outputs
    strides: Strides = {}
    around = _extras([*before, *after])
    needed = [around | _extras(body) for body in bodies]
    last = max((slot for extras in needed for slot in extras), default=-1)
    unfilled = [None] * max(0, last + 1 - captured.slots)
    hoisted = [None] * sum(item.role == "hoisted" for item in captured.inputs)
    memos_around, memos_by_phase = memos

    def bind(inputs: Sequence[Any], phase: int | None) -> list[Any]:
        env = [*inputs, *constants, *hoisted, *spare, *unfilled]
        for memo in memos_around if phase is None else memos_by_phase[phase]:
            memo.fill(env)
        for slot, extra in (around if phase is None else needed[phase]).items():
            env[slot] = extra(env)
        return env[:given] + env[captured.slots :]

    def head(bound: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        env = [*bound[:given], *spare, *bound[given:]]
        run_pieces(before, env)
        for slot, size in zip(sizes, measure(env), strict=True):
            env[slot] = size
        return [env[slot] for slot in carried], env

    def body(bound: Sequence[Any], carry: Sequence[Any], env: list[Any], phase: int) -> list[Any]:
        run_pieces(remainders[phase], env)
        outputs = [env[slot] for slot in stack_outputs]
        for k, value in enumerate(outputs):
            if isinstance(value, torch.Tensor):
                strides[k, value.shape] = value.stride()
        return outputs

    def probing(
        bound: Sequence[Any], carry: Sequence[Any], env: list[Any], phase: int
    ) -> tuple[list[Any], list[Any]]:
        run_pieces(bodies[phase][: cuts[phase]], env)
        return [env[slot] for slot, _ in streams], [
            None if slot is None else env[slot] for _, slot in streams
        ]

    def tail(bound: Sequence[Any], outputs: Sequence[Any], env: list[Any]) -> tuple[Any, ...]:
        for k, (slot, value) in enumerate(zip(stack_outputs, outputs, strict=True)):
            env[slot] = _with_strides(k, value, strides)
        run_pieces(after, env)
        return tuple(env[item] if isinstance(item, int) else item[1] for item in returned)

    base = tuple(None if slot is None else carried.index(slot) for slot in bases)
    programs = Programs(head, body, tail, base, roles, bind)
    return programs if probe is None else replace(programs, probe=probing)


def function_of(
    pieces: Sequence[BoundPiece], outputs: Sequence[int]
) -> Callable[[list[Any]], list[Any]]:
    """The values that pieces write to the slots `outputs`, as a function of the environment."""
    extras = _extras(pieces)
    slots = max(slot for piece in pieces for slot in (*piece.inputs, *piece.outputs)) + 1

    def compute(env: list[Any]) -> list[Any]:
        own = env + [None] * (slots - len(env))
        for slot, extra in extras.items():
            own[slot] = extra(own)
        run_pieces(pieces, own)
        return [own[slot] for slot in outputs]

    return compute


def _extras(pieces: Sequence[BoundPiece]) -> dict[int, Extra]:
    return {slot: extra for piece in pieces for slot, extra in piece.extras}
