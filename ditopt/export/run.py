"""`export`: a workload's model becomes an engine that was compared with the model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ditopt import files
from ditopt.errors import EngineError
from ditopt.export.borders import specs_of
from ditopt.export.bundle import new_folder, record_files, save_tensors
from ditopt.export.compare import SEED, compare_engine
from ditopt.export.describe import describe
from ditopt.export.door import export_model
from ditopt.export.link import link
from ditopt.export.manifest import MANIFEST, PLAN, Manifest
from ditopt.export.recording import RecordedCall, record
from ditopt.export.report import ExportReport
from ditopt.export.schema import Program
from ditopt.export.sizes import OpenSizes, find
from ditopt.pipeline import exporter
from ditopt.plan import Plan
from ditopt.progress import Progress, silent

if TYPE_CHECKING:
    from torch import nn

    from ditopt.backends.base import Exporter
    from ditopt.export.wire import Wired
    from ditopt.workload import Workload

_CHECKED_CALLS = 2


def export(
    workload: Workload,
    out: Path | str,
    plan: Plan | Path | str | None = None,
    *,
    format: str = "pt2",
    model: str | None = None,
    dynamic: Sequence[str] = (),
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
        dynamic: `batch`, `resolution`: sizes that are left open, see `export.sizes`.
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
    sizes = _open_sizes(module, calls, dynamic, chosen, format)
    exported = export_model(module, calls, sizes)
    with new_folder(Path(out)) as folder:
        parts = link(exported, module, chosen, backend.holds_weights)
        seconds["capture"] = time.perf_counter() - started
        started = time.perf_counter()
        notes, programs = _write_programs(backend, parts.wired, folder, options or {}, progress)
        seconds["compile"] = time.perf_counter() - started
        started = time.perf_counter()
        first = exported.calls[0]
        manifest = describe(module, exported, parts, chosen, first, programs, backend)
        _write_rest(folder, manifest, parts.wired, chosen)
        text = (folder / MANIFEST).read_bytes()
        progress("comparing the engine with the model", 3, 4)
        error = compare_engine(folder, workload, name, chosen, exported)
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
        decisions=tuple(parts.decisions),
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


def _open_sizes(
    module: nn.Module,
    calls: Sequence[RecordedCall],
    dynamic: Sequence[str],
    plan: Plan | None,
    format: str,
) -> OpenSizes | None:
    """What is to be left open, or None.

    Raises:
        EngineError: the format or the plan wants one size; says why.
    """
    if not dynamic:
        return None
    reason = "a TensorRT engine is built for one size" if format == "tensorrt" else None
    if plan is not None:
        sites = (site for p in plan.phases for site in (*p.attention, *p.selectors, *p.arithmetic))
        site = next(sites, None)
        if site is not None:
            reason = f"the plan's block lists at {site} are made for one size"
        elif plan.cache is not None:
            reason = "a plan with a cache cuts the model into programs of one size"
        elif len(plan.phases) > 1:
            reason = "a plan with several phases cuts the model into programs of one size"
    if reason is not None:
        raise EngineError(f"--dynamic: {reason}", remedy="Export an engine for each size.")
    return find(module, calls, dynamic)


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


def _write_rest(folder: Path, manifest: Manifest, wired: Wired, plan: Plan | None) -> None:
    if wired.tensors:
        save_tensors(folder, wired.tensors)
    if plan is not None:
        plan.save(folder / PLAN)
    recorded = record_files(folder)
    its_plan = None if plan is None else recorded[PLAN].sha256
    complete = manifest.model_copy(update={"files": recorded, "plan": its_plan})
    files.write_text(folder / MANIFEST, complete.to_text())
