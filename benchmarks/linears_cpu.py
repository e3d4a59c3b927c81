"""int8 layers on a CPU: one call of the trained model, and what each layer loses by format.

    python benchmarks/linears_cpu.py --output benchmarks/results/linears_cpu.json

CPUs multiply int8 several times faster than float32. Variants take turns on one call of the
embedded video model with guidance; layers are measured over one sampling loop.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import contextlib

import torch

from ditopt.demo import demo_workload
from ditopt.environment import describe_environment
from ditopt.profiling.linears import profile_linears
from ditopt.quantization import LinearRule
from ditopt.quantization.plans import candidates, uniform_plan
from ditopt.timing import time_interleaved
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import load_workload


class Enough(BaseException):
    """Ends the loop at its first call."""


def first_call(workload: Any) -> tuple[Any, Any]:
    """Arguments of the loop's first call."""
    found: list[Any] = []

    def grab(*args: Any, **kwargs: Any) -> Any:
        found.append((args, kwargs))
        raise Enough

    with contextlib.suppress(Enough):
        workload.run(0, dict.fromkeys(workload.models, grab))
    return found[0]


def step(workload: Any, rounds: int) -> dict[str, Any]:
    """Median milliseconds of one call, and int8's distance to torch.compile."""
    torch._dynamo.config.recompile_limit = 64
    (model,) = workload.models.values()
    args, kwargs = first_call(workload)
    torch.compile(model, backend="ditopt_eager")(*args, **kwargs)
    graph = compiled_graphs(model)[-1]
    plan = uniform_plan(
        model, graph, LinearRule(format="int8_row"), candidates(graph, min_rows=256)
    )
    variants: dict[str, dict[str, Any]] = {
        "torch.compile": {},
        "ditopt": {"backend": "ditopt"},
        "ditopt, int8": {"backend": "ditopt", "options": {"plan": plan}},
    }
    compiled = {label: torch.compile(model, **how) for label, how in variants.items()}
    runs = {label: (lambda f=f: f(*args, **kwargs)) for label, f in compiled.items()}
    exact, rounded = (runs[label]() for label in ("torch.compile", "ditopt, int8"))
    spreads = time_interleaved(runs, rounds)
    return {
        "error": float((rounded - exact).norm() / exact.norm()),
        "ms": {label: spread.median_ms for label, spread in spreads.items()},
        "iqr_ms": {label: spread.iqr_ms for label, spread in spreads.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    workload = load_workload(demo_workload())
    (model,) = workload.models.values()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        result = {
            "environment": describe_environment(next(model.parameters()).device),
            "step": step(workload, options.rounds),
        }
        print(json.dumps(result, indent=1), flush=True)
        whole = profile_linears(workload, folder, ranges=2)
        result["linears"] = whole.model_dump(mode="json")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
