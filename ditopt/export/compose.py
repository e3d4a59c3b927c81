"""Several steps of a wiring as one graph that holds its weights, for formats of whole models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx, nn

from ditopt.errors import EngineError
from ditopt.export.wire import Wired
from ditopt.export.wiring import Step, Wiring
from ditopt.graph import fake_value, placeholders


def compose(
    steps: Sequence[Step],
    graphs: Sequence[fx.GraphModule],
    tensors: Mapping[str, Tensor],
    needed: Collection[int],
) -> tuple[fx.GraphModule, Step] | None:
    """One graph that does the work of several steps.

    Args:
        steps: in order.
        graphs: of the programs that they name.
        tensors: the stored ones, which become the graph's attributes.
        needed: slots that something later reads.

    Returns:
        The graph and its step, whose program is 0; None for no steps.
    """
    if not steps:
        return None
    root, graph = nn.Module(), fx.Graph()
    values: dict[int | str, fx.Node] = {}
    inputs = _outside(steps)
    for slot, example in inputs.items():
        values[slot] = graph.placeholder(f"slot_{slot}")
        values[slot].meta["val"] = fake_value(placeholders(graphs[example[0]])[example[1]])
    for step in steps:
        gm = graphs[step.program]
        arguments = []
        for source in step.inputs:
            if source not in values:
                assert isinstance(source, str)
                name = f"weight_{len(values)}"
                root.register_buffer(name, tensors[source])
                values[source] = graph.get_attr(name)
                values[source].meta["val"] = tensors[source]
            arguments.append(values[source])
        if any(node.op == "get_attr" for node in gm.graph.nodes):
            raise EngineError("a program with graphs of its own inside cannot be composed")
        copied = dict(zip(placeholders(gm), arguments, strict=True))
        returned = graph.graph_copy(gm.graph, copied)
        assert isinstance(returned, tuple | list)
        for slot, value in zip(step.outputs, returned, strict=True):
            assert isinstance(value, fx.Node)
            values[slot] = value
    written = {slot: None for step in steps for slot in step.outputs}
    outputs = tuple(slot for slot in written if slot in needed)
    graph.output(tuple(values[slot] for slot in outputs))
    return fx.GraphModule(root, graph), Step(program=0, inputs=tuple(inputs), outputs=outputs)


def _outside(steps: Sequence[Step]) -> dict[int, tuple[int, int]]:
    """Slots that the steps read before they write them, with a program's input that they fill."""
    written: set[int] = set()
    found: dict[int, tuple[int, int]] = {}
    for step in steps:
        for position, source in enumerate(step.inputs):
            if isinstance(source, int) and source not in written:
                found.setdefault(source, (step.program, position))
        written.update(step.outputs)
    return found


def compose_sections(wired: Wired) -> Wired:
    """Each section of a wiring as one program with its weights inside."""
    wiring = wired.wiring
    after_needs = set(_outside(wiring.after)) | set(wiring.returned)
    body_needs = {slot for body in wiring.bodies for slot in _outside(body)} | after_needs
    stack = wiring.stack
    bases = set() if stack is None else {slot for slot in stack.bases if slot is not None}
    graphs: list[fx.GraphModule] = []

    def section(steps: Sequence[Step], needed: Collection[int]) -> tuple[Step, ...]:
        made = compose(steps, wired.graphs, wired.tensors, needed)
        if made is None:
            return ()
        graphs.append(made[0])
        return (made[1].model_copy(update={"program": len(graphs) - 1}),)

    cuts = [0] * len(wiring.bodies) if wiring.probe is None else wiring.probe.cuts
    streams = () if wiring.probe is None else wiring.probe.streams
    probed = {slot for pair in streams for slot in pair if slot is not None}
    bodies = []
    for body, cut in zip(wiring.bodies, cuts, strict=True):
        first, rest = body[:cut], body[cut:]
        behind = set(_outside(rest)) | after_needs | probed
        bodies.append((*section(first, behind), *section(rest, after_needs)))
    update: dict[str, object] = {
        "before": section(wiring.before, body_needs | bases | probed),
        "bodies": tuple(bodies),
        "after": section(wiring.after, set(wiring.returned)),
    }
    if wiring.probe is not None:
        update["probe"] = wiring.probe.model_copy(
            update={"cuts": tuple(int(cut > 0) for cut in cuts)}
        )
    composed: Wiring = wiring.model_copy(update=update)
    return Wired(composed, graphs, {})
