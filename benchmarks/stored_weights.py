"""Formats of the weight alone on the trained model: signal to noise, memory, and the clips' PSNR.

    python benchmarks/stored_weights.py --output benchmarks/results/stored_weights_cpu.json

Weights are those of the blocks of the embedded video model. PSNR is of one clip for each seed
against the same loop with the weights as they are; no speed is measured, as none is claimed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import torch
from torch import Tensor, nn

from ditopt.demo import demo_workload
from ditopt.environment import describe_environment
from ditopt.metrics import psnr
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import STORED_FORMATS
from ditopt.quantization.plans import candidates, uniform_plan
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import load_workload

MIN_ROWS = 256


def decibels(weight: Tensor, back: Tensor) -> float:
    return float(20 * torch.log10(weight.norm() / (back - weight).norm()))


def absmax_rows(weight: Tensor) -> Tensor:
    """4 bits by each row's largest magnitude, nothing clipped: the usual comparison."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    return (weight / scale).round().clamp(-7, 7) * scale


def weights_table(weights: list[Tensor]) -> dict[str, Any]:
    """Signal to noise of each weight, and bf16 bytes over stored bytes."""
    rows: dict[str, list[float]] = {"absmax rows, 4 bits": []}
    stored: dict[str, int] = {}
    for weight in weights:
        rows["absmax rows, 4 bits"].append(decibels(weight, absmax_rows(weight)))
        for name, form in STORED_FORMATS.items():
            made = form.encode(weight)
            back = form.decode(made, *weight.shape, torch.float32)
            rows.setdefault(name, []).append(decibels(weight, back))
            stored[name] = stored.get(name, 0) + sum(t.nbytes for t in made.values())
    whole = 2 * sum(weight.numel() for weight in weights)
    return {
        name: {
            "sqnr_db": {"min": min(v), "mean": statistics.fmean(v), "max": max(v)},
            "smaller": whole / stored[name] if name in stored else None,
        }
        for name, v in rows.items()
    }


def clips(workload: Any, seeds: list[int]) -> dict[str, list[float]]:
    """PSNR of each seed's clip by format."""
    ((name, model),) = workload.models.items()
    truth = [workload.run(seed, {name: model}) for seed in seeds]
    found: dict[str, list[float]] = {}
    torch.compiler.reset()
    plain = torch.compile(model, backend="ditopt_eager")
    workload.run(0, {name: plain})
    graph = compiled_graphs(model)[-1]
    sites = candidates(graph, min_rows=MIN_ROWS)
    for form in STORED_FORMATS:
        plan = uniform_plan(model, graph, LinearRule.model_validate({"format": form}), sites)
        torch.compiler.reset()
        run = torch.compile(model, backend="ditopt_eager", options={"plan": plan})
        results = (workload.run(seed, {name: run}) for seed in seeds)
        pairs = zip(results, truth, strict=True)
        found[form] = [psnr(result, exact, workload.data_range) for result, exact in pairs]
        print(form, found[form], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    workload = load_workload(demo_workload())
    (model,) = workload.models.values()
    layers = [m for n, m in model.named_modules() if n.startswith("blocks.")]
    weights = [m.weight.detach().float() for m in layers if isinstance(m, nn.Linear)]
    seeds = list(range(5000, 5000 + options.seeds))
    with torch.no_grad():
        result = {
            "environment": describe_environment(next(model.parameters()).device),
            "weights": weights_table(weights),
            "seeds": seeds,
            "psnr_db": clips(workload, seeds),
        }
    print(json.dumps(result, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
