"""Whole steps and clips with 8-bit layers: the processes that benchmarks/quantization.py starts."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from models import interleave, kernels_of, relative_l2
from quantization_products import CUDA, DEVICE, rule
from shapes import SHAPES, build

from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.quantization.plans import candidates, uniform_plan
from ditopt.timing import Spread, synchronize, timed
from ditopt.torch_backend import compiled_graphs

if TYPE_CHECKING:
    from pathlib import Path

    from ditopt.plan import Plan

MIN_ROWS = 256
LONG = ("flux",)
"""Models whose bf16 variant of ditopt is left to benchmarks/models.py."""


def model_process(name: str, folder: Path, rounds: int, tiny: bool) -> None:
    """Compile all variants of a model, wait for the word, time them, measure memory."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.config.recompile_limit = 64
    model, inputs = build(name, DEVICE, tiny=tiny)
    torch.compile(lambda x: x.sin().sum())(torch.ones(4096, device=DEVICE))
    if CUDA:
        torch.cuda.synchronize()
    result: dict[str, Any] = {"model": name, "title": SHAPES[name].title, "variants": {}}
    with torch.no_grad():
        torch.compile(model, backend="ditopt_eager")(**inputs)
        graph = compiled_graphs(model)[-1]
        sites = candidates(graph, min_rows=1 if tiny else MIN_ROWS)
        shapes = Counter((int(s.rows), s.in_features, s.out_features) for s in sites)
        plan = uniform_plan(model, graph, rule(format="fp8_row"), sites)
        variants: dict[str, dict[str, Any]] = {
            "torch.compile": {},
            "ditopt": {"backend": "ditopt"},
            "ditopt, fp8": {"backend": "ditopt", "options": {"plan": plan}},
        }
        if in_8_bits := _with_attention(plan):
            variants["ditopt, fp8, 8-bit attention"] = {
                "backend": "ditopt",
                "options": {"plan": in_8_bits},
            }
        if name in LONG:
            del variants["ditopt"]
        calls, first = {}, None
        for label, arguments in variants.items():
            run = torch.compile(model, **arguments)
            calls[label] = lambda run=run: run(**inputs)[0]
            with fresh_cache():
                out, first_ms = timed(calls[label])
            first = out if first is None else first
            row = {"first_call_s": first_ms / 1e3, "error": relative_l2(out, first)}
            result["variants"][label] = row
            print(name, label, row, flush=True)
        record = compiled_graphs(model)[-1]
        told = [d for d in record.decisions if d.rule == "quantize_linears"]
        result["decisions"] = dict(Counter(d.reason for d in told))
        result["shapes"] = [[*shape, count] for shape, count in sorted(shapes.items())]
        write_json(folder / f"{name}.ready", result)
        while not (folder / f"{name}.go").exists():
            time.sleep(0.2)
        samples = interleave(calls, rounds)
        for label, times in samples.items():
            spread = Spread.of(times)
            ratios = [b / a for a, b in zip(times, samples["torch.compile"], strict=True)]
            result["variants"][label] |= {
                "ms": spread.median_ms,
                "ms_iqr": spread.iqr_ms,
                "speedup": statistics.median(ratios),
            }
        if CUDA:
            result["profiles"] = {label: kernels_of(run) for label, run in calls.items()}
        write_json(folder / f"{name}.json", result)
        calls.clear()
        del run, first, out
        result["memory"] = _memory(model, plan, sites, inputs)
    write_json(folder / f"{name}.json", result)


def _with_attention(plan: Plan) -> Plan | None:
    """The plan with 8-bit attention where its kernel gains: 128 channels, not to a prompt."""
    sites = (s.id for s in plan.model.sites if s.kind != "cross" and s.head_dim == 128)
    rules = dict.fromkeys(sites, ArithmeticRule(kind="int8_qk_e4m3_pv"))
    phases = tuple(phase.model_copy(update={"arithmetic": rules}) for phase in plan.phases)
    return plan.model_copy(update={"phases": phases}) if rules and CUDA else None


def _memory(model: Any, plan: Any, sites: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Bytes on the device before and after the originals of quantized weights were let go."""
    parameters = dict(model.named_parameters())
    linear = sum(parameters[f"{site.id}.weight"].nbytes for site in sites)
    options = {"plan": plan, "release_weights": True}
    torch.compiler.reset()
    gc.collect()
    before = torch.cuda.memory_allocated() if CUDA else None
    run = torch.compile(model, backend="ditopt", options=options)
    run(**inputs)
    synchronize()
    gc.collect()
    derived = compiled_graphs(model)[-1].derived
    assert derived is not None
    held = sum(t.nbytes for t in derived.tensors if t.release and "scale" in t.names)
    after = torch.cuda.memory_allocated() if CUDA else None
    return {
        "linear_bytes_before": linear,
        "linear_bytes_after": held,
        "model_bytes_before": before,
        "model_bytes_after": after,
    }


def quality_process(folder: Path, seeds: int, tiny: bool) -> None:
    """W8A8 of the trained model against eager, beside what torch.compile alone changes."""
    from ditopt.demo import demo_workload
    from ditopt.metrics import compare
    from ditopt.quantization.statistics import plan_tensors, watch
    from ditopt.workload import load_workload

    workload = load_workload(demo_workload())
    ((name, model),) = workload.models.items()
    torch._dynamo.config.recompile_limit = 64
    audit = range(5000, 5000 + seeds)
    with torch.no_grad():
        with watch(model) as seen:
            workload.run(0, {name: model})
        truth = [workload.run(seed, {name: model}) for seed in audit]
        rows: dict[str, Any] = {}

        def measure(label: str, **arguments: Any) -> None:
            torch.compiler.reset()
            run = torch.compile(model, **arguments)
            found = [
                compare(workload.run(seed, {name: run}), exact, workload.data_range)
                for seed, exact in zip(audit, truth, strict=True)
            ]
            rows[label] = {"psnr_db": [q.psnr_db for q in found]}
            rows[label]["mean_psnr_db"] = statistics.fmean(rows[label]["psnr_db"])
            print("quality", label, rows[label], flush=True)
            write_json(folder / "quality.json", rows)

        measure("torch.compile")
        measure("ditopt", backend="ditopt")
        graph = compiled_graphs(model)[-1]
        sites = candidates(graph, min_rows=MIN_ROWS)
        calls = 20
        for label, fields in QUALITY.items():
            plan = uniform_plan(
                model, graph, rule(**fields), sites, calls=calls, statistics=plan_tensors(seen)
            )
            measure(label, backend="ditopt", options={"plan": plan})


QUALITY: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8_row"},
    "fp8, centred": {"format": "fp8_row", "transform": "centre"},
    "int8": {"format": "int8_row"},
    "int8, balanced": {"format": "int8_row", "transform": "balance"},
    "int8, centred": {"format": "int8_row", "transform": "centre"},
    "int8, rotated": {"format": "int8_row", "transform": "rotate"},
}


def write_json(path: Path, value: Any) -> None:
    """As a whole: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
