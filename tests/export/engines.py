"""Engines of a small model that nothing was compiled for: their programs are the graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditopt.backends.aoti import AotiExporter
from ditopt.export import run
from ditopt.export.borders import specs_of
from ditopt.export.describe import describe
from ditopt.export.door import Exported, export_model
from ditopt.export.engine import Engine
from ditopt.export.link import link
from ditopt.export.manifest import Manifest
from ditopt.export.schema import Program
from ditopt.plan import Plan
from ditopt.quantization import LinearRule
from ditopt.quantization.plans import linear_records
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import Workload

SPARSE = (
    ((0, 2), {}),
    ((2, 6), {"blocks.1#0": [{"kind": "band", "window": 4}, {"kind": "skip"}]}),
)


def workload_of(model: nn.Module, given: Any, sample: Any) -> Workload:
    """The loop of `small_dit.sample`; its result holds what every call returned."""
    return Workload(model, lambda stand_in, seed: torch.stack(sample(stand_in, given)))


def with_int8(plan: Plan, model: nn.Module, given: Any) -> Plan:
    """The plan with each layer of the blocks in 8 bits, in its last phase."""
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend="ditopt_eager")(**given)
    linears = compiled_graphs(model)[-1].linear
    names = [site.id for site in linears if site.id.startswith("blocks")]
    rules = dict.fromkeys(names, LinearRule(format="int8_row"))
    *first, last = plan.phases
    named = plan.model.model_copy(update={"linears": linear_records(linears)})
    phases = (*first, last.model_copy(update={"linear": rules}))
    return plan.model_copy(update={"phases": phases, "model": named})


def exported(workload: Workload, name: str = "model") -> Exported:
    calls = run._sample_calls(workload, name)
    return export_model(workload.models[name], calls)


def in_memory(workload: Workload, plan: Any = None, name: str = "model") -> Engine:
    """The engine that an export would write, with graphs in the place of native programs."""
    module = workload.models[name]
    door = exported(workload, name)
    parts = link(door, module, plan, False)
    programs = []
    for number, gm in enumerate(parts.wired.graphs):
        inputs, outputs = specs_of(gm)
        programs.append(Program(file=f"programs/{number}.pt2", inputs=inputs, outputs=outputs))
    calls = run._sample_calls(workload, name)
    manifest = describe(module, door, parts, plan, calls[0], programs, AotiExporter())
    natives = [lambda given, gm=gm: list(gm(*given)) for gm in parts.wired.graphs]
    device = torch.device("cpu")
    return Engine(manifest, natives, parts.wired.tensors, plan, device)


def text_of(engine: Engine) -> str:
    """Its manifest, with the files that a folder would have."""
    files: dict[str, Any] = {
        name: {"sha256": "0" * 64, "nbytes": 1}
        for name in ["weights.safetensors", *(p.file for p in engine.manifest.programs)]
    }
    if engine.manifest.plan is not None:
        files["plan.yaml"] = {"sha256": engine.manifest.plan, "nbytes": 1}
    document = engine.manifest.model_dump(mode="json")
    return Manifest.model_validate({**document, "files": files}).to_text()
