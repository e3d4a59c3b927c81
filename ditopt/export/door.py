"""The export door: `torch.export` of a model becomes `Captured`, the IR that every pass works on.

Nothing is trusted: what torch exports is compared with the model itself on the calls of a sampling
loop, because some models are exported without an error and wrongly (a write through `.data` is
lost, a branch is frozen).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from ditopt.capture import Captured, Input, capture
from ditopt.errors import EngineError
from ditopt.export.guards import holds_for
from ditopt.export.sizes import dynamic_shapes, resized
from ditopt.export.values import bind, names_of_inputs
from ditopt.export.verify import tolerance, worst_error

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ditopt.export.recording import RecordedCall
    from ditopt.export.sizes import OpenSizes

_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "buffer",
}


@dataclass(frozen=True)
class Exported:
    """A model that torch has exported.

    Attributes:
        program: functional ATen with attention, linear layers and norms kept whole.
        captured: the same as pieces with inputs and sites.
        values: the real values of `captured.inputs`, those of role `constant` left out.
        leaves: every leaf of the first call by name; tensors are inputs, all else is fixed.
        mode: `non-strict` or `strict`.
        error: largest relative error against the model over the calls.
        calls: that it was compared on.
        sizes: what is left open, or None.
    """

    program: ExportedProgram
    captured: Captured
    values: tuple[Any, ...]
    leaves: Mapping[str, Any]
    mode: str
    error: float
    calls: Sequence[RecordedCall]
    sizes: OpenSizes | None = None


def export_model(
    model: nn.Module, calls: Sequence[RecordedCall], sizes: OpenSizes | None = None
) -> Exported:
    """Export a model for the shapes of its first call and check it on every call.

    Args:
        model: in eval mode.
        calls: recorded from the model itself, of equal shapes.
        sizes: what is to be left open; it is checked at further sizes, too.

    Raises:
        EngineError: torch cannot export the model, or exports something else than the model.
    """
    first, open_axes = calls[0], None
    if sizes is not None:
        first = resized(model, calls[0], sizes.axes, sizes.example)
        open_axes = dynamic_shapes(model, first, sizes.axes)
    failures = []
    for mode in ("non-strict", "strict"):
        try:
            program = _export(model, first, open_axes, strict=mode == "strict")
        except Exception as error:  # whatever tracing a model can raise
            lines = str(error).strip().splitlines() or [""]
            failures.append(f"{mode}: {type(error).__name__}: {lines[0][:200]}")
            continue
        checked, held = list(calls), None
        if sizes is not None:
            held = holds_for(model, program, first, sizes)
            further = (resized(model, calls[0], held.axes, s) for s in held.checked())
            checked += [first, *further]
        measured = _error(program, checked)
        if measured <= tolerance(first.result):
            captured, values, leaves = _capture(model, program, first, whole=held is not None)
            return Exported(program, captured, values, leaves, mode, measured, checked, held)
        failures.append(
            f"{mode}: torch.export gives a wrong program without saying so "
            f"(relative error {measured:.2g} against the model)"
        )
    raise EngineError(
        f"torch cannot export {type(model).__name__}: {'; '.join(failures)}",
        remedy='Use torch.compile(model, backend="ditopt") instead.',
    )


def _export(
    model: nn.Module, call: RecordedCall, open_axes: dict[str, Any] | None, *, strict: bool
) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, call.args, dict(call.kwargs), dynamic_shapes=open_axes, strict=strict
        )
        functional: ExportedProgram = program.run_decompositions({})
        return functional


def _error(program: ExportedProgram, calls: Sequence[RecordedCall]) -> float:
    run = program.module()
    errors = []
    with torch.no_grad():
        for call in calls:
            try:
                result = run(*call.args, **call.kwargs)
            except Exception:  # a guard on a value, frozen at the first call's
                return float("inf")
            errors.append(worst_error(result, call.result))
    return max(errors)


def _capture(
    model: nn.Module, program: ExportedProgram, call: RecordedCall, *, whole: bool
) -> tuple[Captured, tuple[Any, ...], dict[str, Any]]:
    named = bind(inspect.signature(model.forward), call.args, call.kwargs)
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise EngineError(
                f"the model writes into {spec.target or 'one of its inputs'} when it is called",
                remedy="An engine's weights are constants; make the forward free of such writes.",
            )
    gm = _with_roles(program, names_of_inputs(call.args, call.kwargs, named))
    captured = capture(gm, whole=whole)
    own = {**program.state_dict, **program.constants}
    values = tuple(
        named[item.name] if item.role == "user" else own[item.name]
        for item in captured.inputs
        if item.role != "constant"
    )
    return captured, values, named


def _with_roles(program: ExportedProgram, names: Sequence[str]) -> fx.GraphModule:
    """The program's graph with a role on each input, and without inputs that are no tensors."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(program.graph_module.graph, copied)
    by_name = {old.name: new for old, new in copied.items() if old.op == "placeholder"}
    users = iter(names)
    for spec in program.graph_signature.input_specs:
        user = next(users) if spec.kind is InputKind.USER_INPUT else None
        node = by_name.get(getattr(spec.arg, "name", ""))
        if node is None:
            continue
        if not isinstance(spec.arg, TensorArgument):
            graph.erase_node(node)
        elif user is not None:
            node.meta["ditopt_input"] = Input(user, "user", node.meta["val"])
        else:
            role: Any = _KINDS[spec.kind]
            node.meta["ditopt_input"] = Input(str(spec.target), role, node.meta["val"])
    graph.output(returned)
    return fx.GraphModule(program.graph_module, graph)
