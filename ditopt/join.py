"""Join consecutive parts of a model into one program.

    blocks.1 | blocks.2 | blocks.3 | blocks.4 | ...   =>   [blocks.1 to 3] | [blocks.4 to 6] | ...

Cutting a model at its blocks saves compilation, because equal blocks share one program. But the
compiler cannot fuse across a cut (the addition that ends a block with the norm that begins the
next), and every program costs the host some tens of microseconds per call. So a few consecutive
blocks become one program, and a model in which cutting would save little stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from ditopt.graph import attribute, fake_value, output_nodes, placeholders
from ditopt.symbols import has_hint, hint

Extra = Callable[[Sequence[Any]], Any]

MAX_TOGETHER = 3
"""Most pieces of a repetition in one program: compile time grows with it, lost fusions shrink."""

HEAVY = 1 << 25
"""Elements of a block's largest result (32,768 tokens of width 1,024) from which it stays single.

Such a block takes many milliseconds. The additions and norms that a cut leaves unfused are then a
third of a percent of it (measured on 32,760 tokens of width 1,536), and three blocks in one program
cost two more seconds of compilation.
"""

MIN_SHARED = 12
"""Programs that cutting must save, else the model is compiled whole.

Compiling a dozen blocks twice as fast saves seconds once; a small model runs steps of a few
milliseconds, in which the tenth of a millisecond that each further program costs the host shows.
"""


@dataclass(frozen=True)
class Part:
    """A stretch of the model after the passes, not yet lowered.

    Attributes:
        key: parts of equal key have interchangeable graphs.
        gm: the graph: one placeholder for each of `inputs`, then one for each of `extras`.
        inputs, outputs: slots of the environment.
        extras: each makes one further argument from the environment.
        kernels: number of block-sparse attentions in it.
    """

    key: Hashable
    gm: fx.GraphModule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    extras: tuple[Extra, ...]
    kernels: int


def most_together(parts: Sequence[Part]) -> int:
    """How many pieces of a repetition are worth one program."""
    results = (fake_value(node) for part in parts for node in output_nodes(part.gm))
    shapes = (x.shape for x in results if isinstance(x, torch.Tensor))
    sizes = [prod(map(hint, shape)) for shape in shapes if all(map(has_hint, shape))]
    return 1 if max(sizes, default=0) >= HEAVY else MAX_TOGETHER


def spans(
    keys: Sequence[Hashable], most: int = MAX_TOGETHER, *, min_shared: int = MIN_SHARED
) -> list[range]:
    """Which consecutive parts to join, so that repetitions still share programs.

    Args:
        keys: of the parts; equal ones can share a program.
        most: pieces of a repetition to join at most.
        min_shared: see `MIN_SHARED`.

    What is left over of a repetition joins the parts before it, which have a program of their own
    anyway.
    """
    if len(keys) - len(set(keys)) < min_shared:
        return [range(len(keys))] if keys else []
    result: list[range] = []
    start = position = 0
    while position < len(keys):
        period, times = _repetition(keys, position)
        together = max(1, most // period)
        groups, left_over = divmod(times, together)
        if times < 2 or groups < 1:
            position += period * times
            continue
        first = position + left_over * period
        position = first + groups * together * period
        if first > start:
            result.append(range(start, first))
        step = together * period
        result += [range(begin, begin + step) for begin in range(first, position, step)]
        start = position
    if start < len(keys):
        result.append(range(start, len(keys)))
    return result


def _repetition(keys: Sequence[Hashable], start: int) -> tuple[int, int]:
    """Period and number of times of the longest repetition that begins at `start`."""
    best = (1, 1)
    for period in range(1, MAX_TOGETHER + 1):
        unit, times = keys[start : start + period], 1
        while keys[start + times * period : start + (times + 1) * period] == unit:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def join(parts: Sequence[Part], read_later: AbstractSet[int]) -> Part:
    """One part that does the work of several consecutive ones.

    Args:
        parts: in execution order.
        read_later: slots that something after the parts reads; other outputs stay inside.
    """
    if len(parts) == 1:
        return parts[0]
    root, graph = nn.Module(), fx.Graph()
    values: dict[int, fx.Node] = {}
    wiring: list[tuple[int, ...]] = []
    position: dict[int, int] = {}  # of each slot, in order of first appearance
    extras = _add_placeholders(graph, parts, values)
    for number, (part, extra_nodes) in enumerate(zip(parts, extras, strict=True)):
        for slot in (*part.inputs, *part.outputs):
            position.setdefault(slot, len(position))
        wiring.append(tuple(position[slot] for slot in (*part.inputs, *part.outputs)))
        arguments = [*(values[slot] for slot in part.inputs), *extra_nodes]
        returned = _copy_body(graph, root, part.gm, arguments, number)
        values.update(zip(part.outputs, returned, strict=True))
    written = {slot for part in parts for slot in part.outputs}
    outputs = tuple(sorted(written & read_later))
    graph.output(tuple(values[slot] for slot in outputs))
    return Part(
        key=(
            tuple(part.key for part in parts),
            tuple(wiring),
            tuple(position[slot] for slot in outputs),
        ),
        gm=fx.GraphModule(root, graph),
        inputs=tuple(_outside(parts)),
        outputs=outputs,
        extras=tuple(extra for part in parts for extra in part.extras),
        kernels=sum(part.kernels for part in parts),
    )


def _outside(parts: Sequence[Part]) -> list[int]:
    """Slots that the parts read and do not write before, in order of first use."""
    written: set[int] = set()
    found: dict[int, None] = {}
    for part in parts:
        found.update((slot, None) for slot in part.inputs if slot not in written)
        written.update(part.outputs)
    return list(found)


def _add_placeholders(
    graph: fx.Graph, parts: Sequence[Part], values: dict[int, fx.Node]
) -> list[list[fx.Node]]:
    """Placeholders of all parts, each slot once, then the extras; returns the extras by part."""

    def add(name: str, source: fx.Node) -> fx.Node:
        node = graph.placeholder(name)
        node.meta = dict(source.meta)
        return node

    sources = {
        slot: source
        for part in reversed(parts)  # the first part that reads a slot says what it is
        for slot, source in zip(part.inputs, placeholders(part.gm), strict=False)
    }
    for slot in _outside(parts):
        values[slot] = add(f"slot_{slot}", sources[slot])
    return [
        [
            add(f"part_{number}_{source.name}", source)
            for source in placeholders(part.gm)[len(part.inputs) :]
        ]
        for number, part in enumerate(parts)
    ]


def _copy_body(
    graph: fx.Graph,
    root: nn.Module,
    gm: fx.GraphModule,
    arguments: Sequence[fx.Node],
    number: int,
) -> list[Any]:
    """Copy the calls of `gm`, with `arguments` for its placeholders; returns its results."""
    copied: dict[fx.Node, fx.Node] = dict(zip(placeholders(gm), arguments, strict=True))
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        if node.op == "get_attr":
            name = f"part_{number}_{str(node.target).replace('.', '_')}"
            setattr(root, name, attribute(gm, str(node.target)))
            copied[node].target = name
    return [copied[value] if isinstance(value, fx.Node) else value for value in output_nodes(gm)]
