"""Capture: a Dynamo graph becomes `Captured`, a list of pieces that share canonical bodies.

The graph is cut into prefix, blocks, glue and suffix first, equal blocks are found by structure,
and one of each is normalised: thirty equal blocks cost one normalisation and, later, one
compilation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from ditopt import graph as graphs
from ditopt.float_inputs import float_reads, sink_float_arithmetic
from ditopt.normalize import MutatesInput, normalize
from ditopt.partition import PieceKind, Run, partition
from ditopt.report import Decision

InputRole = Literal["parameter", "buffer", "user", "symbol", "constant", "hoisted"]


@dataclass(frozen=True)
class Input:
    """One value that the compiled callable receives (or, for a constant, holds).

    Attributes:
        name: fully qualified name of a parameter or buffer, or the forward's argument
            (`added_cond_kwargs.resolution`).
        role: what it is.
        fake: its fake tensor or symbolic integer.
    """

    name: str
    role: InputRole
    fake: Any


@dataclass(frozen=True)
class Body:
    """A canonical ATen graph that one or more pieces run.

    `path` is the block that it was normalised from: its nodes' module paths begin with it.
    """

    key: str
    gm: fx.GraphModule
    path: str


@dataclass(frozen=True)
class Piece:
    """One part of the model in execution order.

    `inputs` and `outputs` are slots of the environment: the captured inputs come first, then every
    piece's outputs.
    """

    kind: PieceKind
    path: str
    body: Body
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Captured:
    """A whole captured frame.

    Attributes:
        inputs: what the callable receives, in Dynamo's order, then the constants that it holds.
        constants: the tensors behind the inputs of role `constant`.
        pieces: in execution order.
        outputs: a slot, or ("value", constant), for each returned value.
        slots: number of environment slots.
        prefix: path of the captured frame's module in the model; empty for the model itself.
        decisions: what capture had to assume or give up.
    """

    inputs: tuple[Input, ...]
    constants: tuple[torch.Tensor, ...]
    pieces: tuple[Piece, ...]
    outputs: tuple[Any, ...]
    slots: int
    prefix: str = ""
    decisions: tuple[Decision, ...] = field(default=())

    @property
    def user_inputs(self) -> dict[str, int]:
        """Name and slot of every tensor that the caller passes to the model."""
        return {item.name: k for k, item in enumerate(self.inputs) if item.role == "user"}

    @property
    def bodies(self) -> dict[str, Body]:
        """The distinct canonical graphs by key."""
        return {piece.body.key: piece.body for piece in self.pieces}


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return node.name
    name = source.name
    return str(name() if callable(name) else name)  # a method up to torch 2.11, then a property


_MEMBER = re.compile(r"\['?([^\]']+)'?\]|\.([A-Za-z_]\w*)")
_PLUMBING = {"__dict__", "_modules", "_parameters", "_buffers"}


def _classify(node: fx.Node) -> Input:
    known = node.meta.get("ditopt_input")  # an exported graph says itself what its inputs are
    if isinstance(known, Input):
        return known
    fake = graphs.fake_value(node)
    raw = _source_name(node)
    parts = [a or b for a, b in _MEMBER.findall(raw.removeprefix("L"))]
    if isinstance(fake, (torch.SymInt, torch.SymFloat, int, float)):
        return Input(raw, "symbol", fake)
    members = [part for part in parts[1:] if part not in _PLUMBING]
    if "_parameters[" in raw or isinstance(fake, torch.nn.Parameter):
        return Input(".".join(members), "parameter", fake)
    if "_buffers[" in raw:
        return Input(".".join(members), "buffer", fake)
    if parts[:1] == ["self"]:  # a plain tensor attribute of the module, such as a RoPE table
        return Input(".".join(members), "buffer", fake)
    name = ".".join([*([] if parts[:1] in (["kwargs"], ["args"]) else parts[:1]), *members])
    return Input(name or raw, "user", fake)


def describe_inputs(gm: fx.GraphModule) -> list[Input]:
    """Name and role of each input of a Dynamo graph, in order."""
    return [_classify(node) for node in graphs.placeholders(gm)]


def _fake_mode(nodes: Sequence[fx.Node]) -> Any:
    from torch._guards import detect_fake_mode

    return detect_fake_mode([graphs.fake_value(node) for node in nodes])


def _lift_constants(
    gm: fx.GraphModule,
) -> tuple[fx.Graph, list[fx.Node], list[torch.Tensor], Any]:
    """Copy the graph, with tensor attributes as further placeholders.

    The original must stay as Dynamo made it: a fallback compiles that.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(gm.graph, copied)
    inputs = [copied[node] for node in gm.graph.nodes if node.op == "placeholder"]
    for old in gm.graph.nodes:
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            copied[old]._dynamo_source = old._dynamo_source
    constants: list[torch.Tensor] = []
    mode = _fake_mode(inputs)
    by_attribute: dict[str, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        value = graphs.attribute(gm, str(node.target))
        if not isinstance(value, torch.Tensor):
            continue
        if str(node.target) not in by_attribute:
            with graph.inserting_before(next(iter(graph.nodes))):
                lifted = graph.placeholder(f"constant_{len(constants)}")
            fake = mode.from_tensor(value, static_shapes=True) if mode is not None else value
            lifted.meta["example_value"] = fake
            by_attribute[str(node.target)] = lifted
            constants.append(value)
        replaced[node] = by_attribute[str(node.target)]
        node.replace_all_uses_with(replaced[node])
        graph.erase_node(node)
    returned = fx.map_arg(returned, lambda node: replaced.get(node, node))
    return graph, inputs + list(by_attribute.values()), constants, returned


def capture(gm: fx.GraphModule, *, prefix: str = "", whole: bool = False) -> Captured:
    """Cut, deduplicate and normalise a Dynamo graph.

    Args:
        gm: the GraphModule that Dynamo hands to a backend; it is not changed.
        prefix: path of the frame's module in the model. After a graph break Dynamo names everything
            relative to an inner module.
        whole: keep the graph in one piece.

    Raises:
        CaptureError: the graph cannot be made functional even as one piece.
    """
    graph, inputs, constants, returned = _lift_constants(gm)
    sink_float_arithmetic(graph)
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    floats = float_reads(calls)
    calls = [n for n in calls if n not in floats]
    runs = [Run("whole", "", tuple(calls))] if whole else partition(calls)
    try:
        captured = _assemble(gm, runs, inputs, constants, returned, floats)
    except MutatesInput as error:
        if len(runs) <= 1:
            raise
        reason = f"kept whole: {error}"
        runs = [Run("whole", "", tuple(calls))]
        captured = _assemble(gm, runs, inputs, constants, returned, floats)
        decision = Decision(site="model", rule="partition", applied=False, reason=reason)
        captured = replace(captured, decisions=(decision,))
    return _prefixed(captured, prefix) if prefix else captured


def _prefixed(captured: Captured, prefix: str) -> Captured:
    """The same with every module path as the model names it."""
    own = ("parameter", "buffer")
    inputs = tuple(
        replace(i, name=f"{prefix}.{i.name}") if i.role in own else i for i in captured.inputs
    )
    return replace(captured, inputs=inputs, prefix=prefix)


def _assemble(
    gm: fx.GraphModule,
    runs: Sequence[Run],
    inputs: Sequence[fx.Node],
    constants: Sequence[torch.Tensor],
    returned: Any,
    floats: Mapping[fx.Node, fx.Node],
) -> Captured:
    n_constants = len(constants)
    described = [_classify(node) for node in inputs[: len(inputs) - n_constants]]
    described += [
        Input(f"constant.{k}", "constant", graphs.fake_value(node))
        for k, node in enumerate(inputs[len(inputs) - n_constants :])
    ]
    slot: dict[fx.Node, int] = {node: k for k, node in enumerate(inputs)}
    slot |= {read: slot[source] for read, source in floats.items()}
    symbol_inputs = {
        next(iter(graphs.free_symbols(graphs.fake_value(node))), ""): node
        for node, item in zip(inputs, described, strict=True)
        if item.role == "symbol"
    }
    escaping: set[fx.Node] = set()
    fx.map_arg(returned, escaping.add)

    bodies: dict[str, Body] = {}
    by_torch_key: dict[str, Body] = {}
    pieces: list[Piece] = []
    for run in runs:
        inside = set(run.nodes)
        sources = [n for n in graphs.external_inputs(run.nodes) if n.op != "get_attr"]
        sources += _symbols_needed(run.nodes, sources, symbol_inputs)
        results = [
            node
            for node in run.nodes
            if node in escaping
            or any(user not in inside and user.op != "output" for user in node.users)
        ]
        torch_key = graphs.structural_key(gm, run.nodes, sources, results)
        if torch_key not in by_torch_key:
            canonical = normalize(
                graphs.subgraph(gm, _with_attributes(run.nodes), sources, results)
            )
            key = graphs.graph_key(canonical)
            by_torch_key[torch_key] = bodies.setdefault(key, Body(key, canonical, run.path))
        for node in results:
            slot[node] = len(slot)
        pieces.append(
            Piece(
                kind=run.kind,
                path=run.path,
                body=by_torch_key[torch_key],
                inputs=tuple(slot[node] for node in sources),
                outputs=tuple(slot[node] for node in results),
            )
        )
    flat = returned if isinstance(returned, (tuple, list)) else (returned,)
    outputs = tuple(slot[v] if isinstance(v, fx.Node) else ("value", v) for v in flat)
    return Captured(tuple(described), tuple(constants), tuple(pieces), outputs, len(slot))


def _with_attributes(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """`nodes`, preceded by the attributes (sub-graphs of higher-order operators) that they read."""
    attributes = [n for n in graphs.external_inputs(nodes) if n.op == "get_attr"]
    return [*attributes, *nodes]


def _symbols_needed(
    nodes: Sequence[fx.Node], sources: Sequence[fx.Node], symbol_inputs: dict[str, fx.Node]
) -> list[fx.Node]:
    """Symbolic sizes that the piece's values mention: the compiler must find each as an input."""
    mentioned: set[str] = set()
    for node in (*nodes, *sources):
        mentioned |= graphs.free_symbols(graphs.fake_value(node))
    present = set(sources)
    return [
        n for name, n in sorted(symbol_inputs.items()) if name in mentioned and n not in present
    ]
