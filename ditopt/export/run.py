"""`export`: a workload's model becomes an engine that was compared with the model."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt import files, fingerprint
from ditopt.config import Options
from ditopt.environment import describe_environment
from ditopt.errors import EngineError, VerificationError
from ditopt.export.bundle import new_folder, record_files, save_tensors
from ditopt.export.compose import compose_sections
from ditopt.export.door import Exported, export_model
from ditopt.export.engine import Engine
from ditopt.export.manifest import MANIFEST, PLAN, Manifest
from ditopt.export.recorder import RecordingBackend
from ditopt.export.recording import RecordedCall, record
from ditopt.export.schema import Call, InputSpec, Parameter, Program, Schedule, TensorSpec
from ditopt.export.values import describe_result, is_plain
from ditopt.export.verify import tolerance, worst_error
from ditopt.export.wire import Wired, Wirer, specs_of
from ditopt.linker import Linker, plan_schedule
from ditopt.pipeline import exporter
from ditopt.plan import Plan
from ditopt.progress import Progress, silent
from ditopt.torch_backend import Compiled

if TYPE_CHECKING:
    from ditopt.backends.base import Exporter
    from ditopt.report import Decision
    from ditopt.runtime import StepSchedule
    from ditopt.workload import Workload

SEED = 7000
"""Of the loop that the engine is checked on; no profile, search or bench uses it by default."""

_CHECKED_CALLS = 2


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        path: the engine's folder.
        format: `pt2`, `onnx` or `tensorrt`.
        sha256: of its manifest, for `expect_sha256`.
        nbytes: of the whole folder.
        programs: how many native programs it holds.
        mode: how torch exported the model: `non-strict` or `strict`.
        export_error: relative error of torch's export against the model.
        engine_error: largest relative error of the loaded engine against the model (without a
            plan) or against the compiled model with the plan, over the calls of a sampling loop.
        seconds: time by part.
        notes: what the engine does by other means than the compiled model.
        decisions: of every pass at every site.
    """

    path: Path
    format: str
    sha256: str
    nbytes: int
    programs: int
    mode: str
    export_error: float
    engine_error: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "sha256": self.sha256,
            "nbytes": self.nbytes,
            "programs": self.programs,
            "mode": self.mode,
            "export_error": self.export_error,
            "engine_error": self.engine_error,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "notes": list(self.notes),
            "decisions": [decision.to_json() for decision in self.decisions],
        }


def export(
    workload: Workload,
    out: Path | str,
    plan: Plan | Path | str | None = None,
    *,
    format: str = "pt2",
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Export a workload's model for the sizes of its sampling loop.

    Nothing is written unless the exported program equals the model and the loaded engine equals
    what it was made from.

    Args:
        workload: the model and its loop.
        out: the engine's folder; an older engine there is replaced.
        plan: choices to build in.
        format: `pt2`, `onnx` or `tensorrt`.
        model: name of the denoiser, where the workload has several.
        options: Inductor's own.
        progress: told about every stage.

    Raises:
        EngineError: the model or the plan cannot be exported; says why.
        VerificationError: the engine's numbers are not the model's.
        BackendUnavailable: the format needs something that is not installed.
    """
    backend = exporter(format)
    chosen = Plan.load(plan) if isinstance(plan, str | Path) else plan
    name = _model_name(workload, model)
    module = workload.models[name]
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    progress("recording the model's calls", 0, 4)
    calls = _sample_calls(workload, name)
    progress("exporting the graph", 1, 4)
    exported = export_model(module, calls)
    with new_folder(Path(out)) as folder:
        linked = _link(exported, module, chosen, options, backend.holds_weights)
        seconds["capture"] = time.perf_counter() - started
        started = time.perf_counter()
        notes, programs = _write_programs(backend, linked.wired, folder, options or {}, progress)
        seconds["compile"] = time.perf_counter() - started
        started = time.perf_counter()
        manifest = _manifest(module, exported, linked, chosen, calls[0], programs, backend)
        _write_rest(folder, manifest, linked.wired, chosen)
        text = (folder / MANIFEST).read_bytes()
        progress("comparing the engine with the model", 3, 4)
        error = _verify(folder, workload, name, chosen, calls)
        seconds["verify"] = time.perf_counter() - started
        nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    progress("comparing the engine with the model", 4, 4)
    return ExportReport(
        path=Path(out),
        format=format,
        sha256=hashlib.sha256(text).hexdigest(),
        nbytes=nbytes,
        programs=len(programs),
        mode=exported.mode,
        export_error=exported.error,
        engine_error=error,
        seconds=seconds,
        notes=tuple(notes),
        decisions=tuple(linked.decisions),
    )


def _model_name(workload: Workload, model: str | None) -> str:
    names = list(workload.models)
    if model is None and len(names) == 1:
        return names[0]
    if model not in names:
        raise EngineError(
            f"the workload has the denoisers {', '.join(names)}; which one is to be exported?",
            remedy="Name it with --model.",
        )
    return model


def _sample_calls(workload: Workload, name: str) -> Sequence[RecordedCall]:
    """The first and the last call of a loop; both have the shapes that the engine is for."""
    every = record(workload, name, seed=SEED)
    if not every:
        raise EngineError(f"the sampling loop never called {name!r}")
    shapes = _shapes(every[0])
    for number, call in enumerate(every):
        if _shapes(call) != shapes:
            raise EngineError(
                f"call {number} of the loop has other shapes than call 0; an engine has one size"
            )
    picked = sorted({0, len(every) - 1})[:_CHECKED_CALLS]
    return [every[number] for number in picked]


def _shapes(call: RecordedCall) -> Any:
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [(leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _Linked:
    wired: Wired
    schedule: StepSchedule | None
    cached: bool
    decisions: Sequence[Decision]


def _link(
    exported: Exported,
    module: nn.Module,
    plan: Plan | None,
    options: Mapping[str, Any] | None,
    holds_weights: bool,
) -> _Linked:
    """Passes and programs as `torch.compile` would make them.

    A format whose programs hold their weights gets few of them: nothing is kept between calls.
    """
    from ditopt.sites import find_sites

    if plan is not None and plan.cache is not None and getattr(plan.cache, "gate", None):
        raise EngineError(
            "cache.gate: an engine has no gate yet; its skip calls are those of the plan",
            remedy="Leave the gate out of the plan, or use torch.compile.",
        )
    record = Compiled(root=lambda: module)
    record.attention, record.linear = find_sites(exported.captured)
    given = {"plan": plan, "inductor": dict(options or {}), "hoist": not holds_weights}
    settings = Options.parse(given, {})
    linker = Linker(exported.captured, exported.values, record, settings, module)
    linker.link(RecordingBackend())
    assert linker.builder is not None
    wired = Wirer(linker.builder, exported.values).run()
    if holds_weights:
        wired = compose_sections(wired)
    cached = wired.wiring.stack is not None and plan is not None and plan.cache is not None
    schedule = plan_schedule(plan, None, cached=cached) if plan is not None else None
    return _Linked(wired, schedule, cached, record.decisions)


def _write_programs(
    backend: Exporter, wired: Wired, folder: Path, options: Mapping[str, Any], progress: Progress
) -> tuple[list[str], list[Program]]:
    (folder / "programs").mkdir()
    notes: dict[str, None] = {}
    programs = []
    for number, gm in enumerate(wired.graphs):
        progress(f"compiling {len(wired.graphs)} programs", number, len(wired.graphs))
        name = f"programs/{number}{backend.suffix}"
        notes.update(dict.fromkeys(backend.export(gm, folder / name, options)))
        inputs, outputs = specs_of(gm)
        if not backend.keeps_strides:
            inputs = tuple(spec.packed() for spec in inputs)
            outputs = tuple(spec.packed() for spec in outputs)
        programs.append(Program(file=name, inputs=inputs, outputs=outputs))
    return list(notes), programs


def _manifest(
    module: nn.Module,
    exported: Exported,
    linked: _Linked,
    plan: Plan | None,
    call: RecordedCall,
    programs: Sequence[Program],
    backend: Exporter,
) -> Manifest:
    captured, wired = exported.captured, linked.wired
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
        cached=linked.cached,
        device="cuda" if first.device.type == "cuda" else "cpu",
        dtype=str(first.dtype).removeprefix("torch."),
        config=_plain_config(module),
        environment=environment,
        call=Call(
            parameters=_parameters(module),
            inputs=tuple(
                InputSpec(name=name, spec=_input_spec(exported.leaves[name], backend))
                for name in users
            ),
            fixed=_fixed(exported.leaves),
            result=describe_result(call.result)[0],
        ),
        tensors={name: TensorSpec.of(value) for name, value in wired.tensors.items()},
        programs=tuple(programs),
        wiring=wired.wiring,
        schedule=_short_schedule(linked.schedule),
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
    return Schedule(phases=tuple(map(schedule.phase_of, calls)), sources=schedule.sources)


def _write_rest(folder: Path, manifest: Manifest, wired: Wired, plan: Plan | None) -> None:
    if wired.tensors:
        save_tensors(folder, wired.tensors)
    if plan is not None:
        plan.save(folder / PLAN)
    complete = manifest.model_copy(update={"files": record_files(folder)})
    files.write_text(folder / MANIFEST, complete.to_text())


def _verify(
    folder: Path,
    workload: Workload,
    name: str,
    plan: Plan | None,
    calls: Sequence[RecordedCall],
) -> float:
    """Largest relative error of the written engine over calls whose results are known."""
    engine = Engine.load(folder, verify_borders=True)
    if plan is not None:
        calls = _calls_with_plan(workload, name, plan)
    errors = []
    with torch.no_grad():
        for number, call in enumerate(calls):
            errors.append(worst_error(engine(*call.args, **call.kwargs), call.result))
            if errors[-1] > tolerance(call.result):
                raise VerificationError(
                    f"the engine is wrong at call {number}: relative error {errors[-1]:.2g}, "
                    f"at most {tolerance(call.result):.2g} is rounding",
                    remedy="Nothing was written. Please report the model and the plan.",
                )
    return max(errors)


def _calls_with_plan(workload: Workload, name: str, plan: Plan) -> Sequence[RecordedCall]:
    """A whole sampling loop of the model with the plan, by the oracle."""
    options: Any = {"plan": plan}
    torch.compiler.reset()
    compiled = torch.compile(workload.models[name], backend="ditopt_eager", options=options)
    calls = record(workload, name, seed=SEED, model=compiled)
    torch.compiler.reset()
    return calls
