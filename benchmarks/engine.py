"""The embedded video model as an engine, beside the compiled model that it was made from.

    python benchmarks/engine.py --engines engines                    # without a plan
    python benchmarks/engine.py --plan plan.yaml --loops 5 --engines engines
    python benchmarks/engine.py --plan plan.yaml --linear int8_row --loops 5 --seeds 2 --engines e
    python benchmarks/engine.py --plan cpu_plan.yaml --profile prof --loops 9 --engines engines

Times one call of the model (the first of the sampling loop) by each in turn; with --loops whole
sampling loops too, where a plan's skipped calls count, and with --seeds their PSNR against the
dense model. --profile takes the records of model and device from a profile made here, for a plan
found on another device. --linear adds a number format to every large layer of the blocks in every
phase but the first. On a busy CPU the processor time of this process tells more than the clock, so
both are recorded. Engines in --engines are kept; numbers that were not asked for are kept, too,
where the output file has them already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ditopt.bench import FIRST_SEED  # noqa: E402
from ditopt.demo import demo_workload  # noqa: E402
from ditopt.environment import describe_environment  # noqa: E402
from ditopt.export.engine import Engine  # noqa: E402
from ditopt.export.recording import record  # noqa: E402
from ditopt.export.run import export  # noqa: E402
from ditopt.export.verify import worst_error  # noqa: E402
from ditopt.files import write_json  # noqa: E402
from ditopt.metrics import compare  # noqa: E402
from ditopt.plan import Plan  # noqa: E402
from ditopt.profiling.schema import Profile  # noqa: E402
from ditopt.quantization import LinearRule  # noqa: E402
from ditopt.quantization.plans import candidates, linear_records  # noqa: E402
from ditopt.timing import timed  # noqa: E402
from ditopt.torch_backend import compiled_graphs  # noqa: E402
from ditopt.workload import load_workload  # noqa: E402

SEED = 11


def in_turn(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median wall clock and processor time of each, in milliseconds, after one unmeasured turn."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        order = list(variants) if number % 2 else list(variants)[::-1]
        for name in order:
            before = time.process_time()
            _, ms = timed(variants[name])
            if number:
                wall[name].append(ms)
                cpu[name].append(1e3 * (time.process_time() - before))
    row: dict[str, Any] = {}
    for name in variants:
        row[name] = {
            "ms": round(statistics.median(wall[name]), 3),
            "cpu_ms": round(statistics.median(cpu[name]), 3),
            "samples": rounds,
        }
    return row


def for_this_device(plan: Plan, profile: Profile) -> Plan:
    """The plan with the model (its dtype) and the device of a profile that was made here."""
    model = profile.model.model_copy(update={"linears": plan.model.linears})
    return plan.model_copy(update={"model": model, "hardware": profile.hardware})


def in_8_bits(plan: Plan, call: Any, model: torch.nn.Module, number_format: Any) -> Plan:
    """The plan with a format where it is worth it, in all phases but the careful first one."""
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend="ditopt_eager")(*call.args, **call.kwargs)
    graph = compiled_graphs(model)[-1]
    torch.compiler.reset()
    rules = dict.fromkeys((s.id for s in candidates(graph)), LinearRule(format=number_format))
    first, *later = plan.phases
    phases = (first, *(phase.model_copy(update={"linear": rules}) for phase in later))
    named = plan.model.model_copy(update={"linears": linear_records(graph.linear)})
    return plan.model_copy(update={"phases": phases, "model": named})


def psnr_db(
    workload: Any, name: str, variants: dict[str, Any], seeds: int
) -> dict[str, list[float]]:
    """PSNR of each variant's loop against the dense model's, by seed."""
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        dense = workload.run(seed)
        for variant, model in variants.items():
            quality = compare(workload.run(seed, {name: model}), dense, workload.data_range)
            found[variant].append(round(quality.psnr_db, 3))
        print(seed, {variant: values[-1] for variant, values in found.items()}, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9, help="single calls")
    parser.add_argument("--loops", type=int, default=0, help="whole sampling loops")
    parser.add_argument("--seeds", type=int, default=0, help="of PSNR against the dense model")
    parser.add_argument("--profile", type=Path, help="of the embedded model on this device")
    parser.add_argument("--linear", help="number format of the plan's layers, such as int8_row")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    workload = load_workload(demo_workload())
    name, model = next(iter(workload.models.items()))
    device = next(model.parameters()).device
    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    call = record(workload, name, seed=SEED)[0]
    label = "eng_no_plan" if plan is None else "eng_plan"
    if plan is not None and arguments.profile:
        plan, label = for_this_device(plan, Profile.load(arguments.profile)), "eng_plan_adopted"
    if plan is not None and arguments.linear:
        plan = in_8_bits(plan, call, model, arguments.linear)
        label += f"_{arguments.linear}"
    folder = arguments.engines / label
    if not folder.exists():
        arguments.engines.mkdir(parents=True, exist_ok=True)
        print(json.dumps(export(workload, folder, plan).to_json()["seconds"]), flush=True)
    engine, load_ms = timed(lambda: Engine.load(folder))
    options: Any = None if plan is None else {"plan": plan}
    compiled = torch.compile(model, backend="ditopt", options=options)
    with torch.no_grad():
        results = {k: f(*call.args, **call.kwargs) for k, f in (("e", engine), ("c", compiled))}
        once = {
            "compiled": lambda: compiled(*call.args, **call.kwargs),
            "engine": lambda: engine(*call.args, **call.kwargs),
        }
        calls = in_turn(once, arguments.rounds) if arguments.rounds else {}
    loops = {}
    if arguments.loops:
        run = workload.run
        variants = {
            "compiled": lambda: run(SEED, {name: compiled}),
            "engine": lambda: run(SEED, {name: engine}),
        }
        loops = in_turn(variants, arguments.loops)
    quality = psnr_db(workload, name, {"compiled": compiled, "engine": engine}, arguments.seeds)
    phases = () if plan is None else plan.phases
    files = [path for path in folder.rglob("*") if path.is_file()]
    result = {
        "environment": describe_environment(device),
        "workload": workload.title,
        "plan": None if plan is None else str(plan.goal),
        "sparse_sites": max((len(phase.attention) for phase in phases), default=0),
        "formats": sorted({r.format for phase in phases for r in phase.linear.values()}),
        "layers_in_them": max((len(phase.linear) for phase in phases), default=0),
        "load_ms": round(load_ms, 1),
        "nbytes": sum(path.stat().st_size for path in files),
        "weights_nbytes": sum(p.nbytes for p in model.parameters()),
        "programs": len(engine.manifest.programs),
        "relative_l2": worst_error(results["e"], results["c"]),
        "one_call": calls,
        "one_loop": loops,
        "psnr_db": quality if arguments.seeds else {},
    }
    output = arguments.output or ROOT / f"benchmarks/results/engine_{device.type}.json"
    if output.exists():
        known = json.loads(output.read_text())
        for key in ("one_call", "one_loop", "psnr_db"):
            result[key] = result[key] or known.get(key, {})
    print(json.dumps(result, indent=1))
    write_json(output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
