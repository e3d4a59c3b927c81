"""The block stack: the pieces that a skipped step leaves out, and what they carry through.

A skipped step replaces the stack's outputs by forecasts. An output that continues a value which
entered the stack (the residual stream) is forecast as its base plus a residual; any other output is
forecast as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ditopt.graph import fake_value, output_nodes
from ditopt.partition import is_matmul

if TYPE_CHECKING:
    from ditopt.capture import Captured


@dataclass(frozen=True)
class Stack:
    """Pieces `first` to `end` (half-open) of a captured model.

    Attributes:
        outputs: slots that the stack writes and later pieces, or the caller, read.
        bases: for each output the slot, written before the stack, that it continues, or None.
        sizes: slots of symbolic sizes that the stack writes and later pieces read; a skipped step
            computes them from the call's shapes.
    """

    first: int
    end: int
    outputs: tuple[int, ...]
    bases: tuple[int | None, ...]
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Probe:
    """The first blocks of a stack, which run before it is decided whether the others do.

    Attributes:
        end: the first piece behind them.
        streams: slots that they write and later pieces read, each with the slot, written before the
            stack, that it continues. Where no such stream is found, all of them, with None.
    """

    end: int
    streams: tuple[tuple[int, int | None], ...]


def find_probe(captured: Captured, stack: Stack, blocks: int) -> Probe | str:
    """The first `blocks` blocks of a stack, or the reason why they cannot be told apart."""
    found = [k for k in range(stack.first, stack.end) if captured.pieces[k].kind == "block"]
    if blocks >= len(found):
        return f"the stack has {len(found)} blocks, so {blocks} leave nothing to skip"
    end = found[blocks]
    first = _stack(captured, stack.first, end)
    pairs = list(zip(first.outputs, first.bases, strict=True))
    continued = [(slot, base) for slot, base in pairs if base is not None and base in stack.bases]
    return Probe(end, tuple(continued or [(slot, None) for slot, _ in pairs]))


def unseen_inputs(captured: Captured, stack: Stack, varying: Collection[str]) -> list[str]:
    """Inputs that change from call to call and reach a result only through the inside of a stack.

    ControlNet residuals, added behind the blocks, are such: a call that skips the blocks cannot see
    this call's. What also goes into a carried tensor, as the latents do, is seen.
    """
    reach: dict[int, set[str]] = {
        slot: {name} for name, slot in captured.user_inputs.items() if name in varying
    }

    def behind(slots: Iterable[int]) -> set[str]:
        return {name for slot in slots for name in reach.get(slot, ())}

    inside: set[str] = set()
    for number, piece in enumerate(captured.pieces):
        if stack.first <= number < stack.end:
            entering = set(piece.inputs) - set(stack.bases)
            inside |= behind(entering)
            continue
        for slot in piece.outputs:
            reach[slot] = behind(piece.inputs)
    after = (slot for piece in captured.pieces[stack.end :] for slot in piece.inputs)
    seen = behind(slot for slot in stack.bases if slot is not None) | behind(after)
    return [name for name in captured.user_inputs if name in inside - seen]


def find_stack(captured: Captured) -> Stack | str:
    """The largest block stack whose outputs all have a base, or the reason why there is none.

    Neighbouring containers (FLUX's two-stream and one-stream blocks) join the heaviest one where
    nothing but reshaping lies between them.
    """
    weights: dict[str, int] = defaultdict(int)
    for piece in captured.pieces:
        if piece.kind == "block":
            weights[_container(piece.path)] += _parameters(captured, piece.inputs)
    if not weights:
        return "no repeated blocks were found in the graph"
    main = max(weights, key=lambda name: weights[name])
    members = [
        k for k, p in enumerate(captured.pieces) if p.kind == "block" and _container(p.path) == main
    ]
    inner = (members[0], members[-1] + 1)
    wide = _extended(captured, *inner)
    stacks = [_stack(captured, *span) for span in dict.fromkeys((wide, inner))]
    carried = [stack for stack in stacks if None not in stack.bases]
    return (carried or stacks[-1:])[0]


def _container(path: str) -> str:
    return path.rsplit(".", 1)[0]


def _parameters(captured: Captured, slots: Sequence[int]) -> int:
    known = [captured.inputs[s] for s in slots if s < len(captured.inputs)]
    return sum(prod(item.fake.shape) for item in known if item.role == "parameter")


def _extended(captured: Captured, first: int, end: int) -> tuple[int, int]:
    """The span with adjacent blocks added, across glue that multiplies no matrices."""

    def joins(index: int) -> bool:
        piece = captured.pieces[index]
        if piece.kind == "block":
            return True
        return piece.kind == "glue" and not any(is_matmul(n) for n in piece.body.gm.graph.nodes)

    while first > 0 and joins(first - 1):
        first -= 1
    while end < len(captured.pieces) and joins(end):
        end += 1
    while captured.pieces[first].kind != "block":
        first += 1
    while captured.pieces[end - 1].kind != "block":
        end -= 1
    return first, end


def _stack(captured: Captured, first: int, end: int) -> Stack:
    written = {slot for piece in captured.pieces[first:end] for slot in piece.outputs}
    read = {slot for piece in captured.pieces[end:] for slot in piece.inputs}
    read |= {slot for slot in captured.outputs if isinstance(slot, int)}
    crossing = sorted(written & read)
    sizes = tuple(s for s in crossing if isinstance(slot_value(captured, s), (int, torch.SymInt)))
    outputs = tuple(s for s in crossing if s not in sizes)
    bases = tuple(_base(captured, first, end, slot) for slot in outputs)
    return Stack(first, end, outputs, bases, sizes)


def slot_value(captured: Captured, slot: int) -> Any:
    """The fake tensor or symbolic size in a slot of the environment."""
    if slot < len(captured.inputs):
        return captured.inputs[slot].fake
    piece = next(p for p in captured.pieces if slot in p.outputs)
    return fake_value(output_nodes(piece.body.gm)[piece.outputs.index(slot)])


def _base(captured: Captured, first: int, end: int, slot: int) -> int | None:
    """Follow a residual stream back through the stack to the slot where it entered."""
    writer = {s: k for k in range(first, end) for s in captured.pieces[k].outputs}
    wanted = _shape_of(captured, slot, writer)
    while slot in writer:
        previous = _continued(captured, first, end, writer, slot, wanted)
        if previous is None:
            return None
        slot = previous
    return slot


def _continued(
    captured: Captured, first: int, end: int, writer: dict[int, int], slot: int, wanted: object
) -> int | None:
    """The input of the writing piece that `slot` continues."""
    index = writer[slot]
    piece = captured.pieces[index]
    position = piece.outputs.index(slot)
    # Where equal blocks follow each other, their wiring says which input an output continues.
    for a in range(first, end):
        if captured.pieces[a].body is not piece.body:
            continue
        stream = captured.pieces[a].outputs[position]
        for b in range(a + 1, end):
            other = captured.pieces[b]
            if other.body is piece.body and stream in other.inputs:
                return piece.inputs[other.inputs.index(stream)]
    candidates = [
        s
        for s in piece.inputs
        if not _is_weight(captured, s) and _shape_of(captured, s, writer) == wanted
    ]
    if len(candidates) > 1:
        # What is added on the way (ControlNet residuals) enters from outside, the stream does not.
        candidates = [s for s in candidates if s in writer]
    return candidates[0] if len(candidates) == 1 else None


def _is_weight(captured: Captured, slot: int) -> bool:
    return slot < len(captured.inputs) and captured.inputs[slot].role in (
        "parameter",
        "buffer",
        "constant",
        "symbol",
    )


def _shape_of(captured: Captured, slot: int, writer: dict[int, int]) -> object:
    value = slot_value(captured, slot)
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
