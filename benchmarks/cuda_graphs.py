"""The embedded model's sampling loop with and without CUDA graphs, where the host is the limit.

    python benchmarks/cuda_graphs.py --output benchmarks/results/cuda_graphs_h200.json

Each variant runs its loop of 20 calls three times unmeasured, then `--rounds` times: median, least
and most milliseconds, with the device's work. `plan` forecasts two of three calls from the third on
by a straight line; its quality is not the point here. Graphs must not change a bit of the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ditopt
from ditopt import fingerprint
from ditopt.demo import demo_workload
from ditopt.environment import describe_environment
from ditopt.plan import Cache, Hardware, ModelRecord, Phase, Plan, SiteRecord
from ditopt.profiling.loops import plain_loop, sampler_of
from ditopt.timing import synchronize
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import Workload, load_workload


def line_plan(workload: Workload) -> Plan:
    """Calls 0, 1, 3, 6, 9, ... in full, the others on the line through the two before."""
    (model,) = workload.models.values()
    sampler = sampler_of(plain_loop(workload)[0])
    torch.compiler.reset()
    workload.run(0, {"model": torch.compile(model, backend="ditopt_eager")})
    full = (0, 1, *range(3, sampler.calls, 3))
    rows = {call: (1.5, -0.5) for call in range(sampler.calls) if call not in full}
    return Plan(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name=type(model).__name__,
            sites=tuple(
                SiteRecord(id=s.id, kind=s.kind, heads=s.heads, head_dim=s.head_dim)
                for s in compiled_graphs(model)[-1].attention
            ),
        ),
        sampler=sampler,
        hardware=Hardware(device="cuda", name="-", torch=torch.__version__, threads=1),
        phases=(Phase(calls=(0, sampler.calls)),),
        cache=Cache(full=full, history=2, coefficients=rows),
    )


def variants(plan: Plan) -> dict[str, dict[str, Any] | None]:
    """Arguments of `torch.compile`; None is eager."""
    return {
        "eager": None,
        "inductor": {},
        "inductor, reduce-overhead": {"mode": "reduce-overhead"},
        "ditopt": {"backend": "ditopt"},
        "ditopt, graphs": {"backend": "ditopt", "options": {"cuda_graphs": True}},
        "ditopt+plan": {"backend": "ditopt", "options": {"plan": plan}},
        "ditopt+plan, graphs": {
            "backend": "ditopt",
            "options": {"plan": plan, "cuda_graphs": True},
        },
    }


def measure(workload: Workload, run: Callable[..., Any], calls: int, rounds: int) -> dict[str, Any]:
    times: list[float] = []
    for number in range(rounds + 3):
        synchronize()
        started = time.perf_counter()
        with ditopt.session(calls=calls):
            result = workload.run(0, {"model": run})
        synchronize()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    median = statistics.median(times)
    return {
        "loop_ms": round(median, 2),
        "least_ms": round(min(times), 2),
        "most_ms": round(max(times), 2),
        "call_ms": round(median / calls, 3),
        "result": result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    workload = load_workload(demo_workload())
    (model,) = workload.models.values()
    plan = line_plan(workload)
    rows: dict[str, dict[str, Any]] = {}
    for name, options in variants(plan).items():
        torch.compiler.reset()
        run = model if options is None else torch.compile(model, **options)
        rows[name] = measure(workload, run, plan.sampler.calls, args.rounds)
        print(f"{name:28s} {rows[name]['loop_ms']:8.2f} ms a loop", flush=True)
    results: dict[str, Tensor] = {name: row.pop("result") for name, row in rows.items()}
    same = {
        name: bool(torch.equal(results[name], results[f"{name}, graphs"]))
        for name in ("ditopt", "ditopt+plan")
    }
    record = {
        "environment": describe_environment(next(model.parameters()).device),
        "model": "tiny_video, bf16, guidance as a batch of 2, 2,048 tokens",
        "calls": plan.sampler.calls,
        "full_calls": len(plan.cache.full) if plan.cache is not None else plan.sampler.calls,
        "rounds": args.rounds,
        "rows": rows,
        "bit_equal_with_graphs": same,
    }
    print(json.dumps(same))
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
