"""The manifest of a new engine: what the model is, how it is called, what was stored."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditopt import fingerprint
from ditopt.environment import describe_environment
from ditopt.errors import EngineError
from ditopt.export.manifest import Manifest
from ditopt.export.schema import Call, InputSpec, Parameter, Program, SizeRange, TensorSpec
from ditopt.export.values import describe_result, is_plain
from ditopt.export.wiring import Schedule

if TYPE_CHECKING:
    from torch import nn

    from ditopt.backends.base import Exporter
    from ditopt.export.door import Exported
    from ditopt.export.link import EngineParts
    from ditopt.export.recording import RecordedCall
    from ditopt.plan import Plan
    from ditopt.runtime import StepSchedule


def describe(
    module: nn.Module,
    exported: Exported,
    parts: EngineParts,
    plan: Plan | None,
    call: RecordedCall,
    programs: Sequence[Program],
    backend: Exporter,
) -> Manifest:
    """The manifest of an engine, but for the files of its folder.

    Args:
        module: the model.
        exported: what torch exported of it.
        parts: what is stored.
        plan: that was built in.
        call: one of the model's, with its result.
        programs: that were written.
        backend: that wrote them.
    """
    captured, wired, sizes = exported.captured, parts.wired, exported.sizes
    users = {item.name: k for k, item in enumerate(captured.inputs) if item.role == "user"}
    first = next(module.parameters(), torch.empty(0))
    environment = describe_environment(first.device)
    if first.device.type == "cuda":
        environment["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return Manifest(
        format=backend.format,
        name=type(module).__name__,
        architecture=fingerprint.architecture(module),
        weights=fingerprint.weights(module),
        plan=None if plan is None else hashlib.sha256(plan.to_text().encode()).hexdigest(),
        cached=parts.cached,
        device="cuda" if first.device.type == "cuda" else "cpu",
        dtype=str(first.dtype).removeprefix("torch."),
        config=_plain_config(module),
        environment=environment,
        call=Call(
            parameters=_parameters(module),
            inputs=tuple(
                InputSpec(
                    name=name,
                    spec=_input_spec(exported.leaves[name], backend),
                    axes=() if sizes is None else tuple(sizes.axes.get(name, {}).items()),
                )
                for name in users
            ),
            sizes={}
            if sizes is None
            else {
                name: SizeRange(least=r.least, most=r.most, step=r.step)
                for name, r in sizes.ranges.items()
            },
            fixed=_fixed(exported.leaves),
            result=describe_result(call.result)[0],
        ),
        tensors={name: TensorSpec.of(value) for name, value in wired.tensors.items()},
        programs=tuple(programs),
        wiring=wired.wiring,
        schedule=_short_schedule(parts.schedule),
        files={},
    )


def _input_spec(value: Tensor, backend: Exporter) -> TensorSpec:
    spec = TensorSpec.of(value)
    return spec if backend.keeps_strides else spec.packed()


def _parameters(module: nn.Module) -> tuple[Parameter, ...]:
    found = []
    for item in inspect.signature(module.forward).parameters.values():
        required = item.default is inspect.Parameter.empty
        default = item.default if not required and is_plain(item.default) else None
        name, kind = item.name, item.kind.name
        found.append(Parameter(name=name, kind=kind, required=required, default=default))
    return tuple(found)


def _fixed(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller passes beside tensors: the engine holds for these values only."""
    fixed = {}
    for name, value in leaves.items():
        if isinstance(value, Tensor):
            continue
        if not is_plain(value):
            raise EngineError(f"{name}: a {type(value).__name__} cannot be an engine's argument")
        fixed[name] = value
    return fixed


def _plain_config(module: nn.Module) -> dict[str, Any]:
    """The entries of the model's config that JSON can hold."""
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        return {}

    def plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return is_plain(value)

    return {str(key): value for key, value in config.items() if plain(value)}


def _short_schedule(schedule: StepSchedule | None) -> Schedule | None:
    if schedule is None:
        return None
    calls = range(schedule.calls)
    return Schedule(
        phases=tuple(map(schedule.phase_of, calls)),
        sources=schedule.sources,
        gated=schedule.gate is not None,
    )
