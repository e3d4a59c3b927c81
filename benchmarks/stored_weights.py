"""Formats of the weight alone on the trained model: signal to noise, memory, and the clips' PSNR.

    python benchmarks/stored_weights.py --output benchmarks/results/stored_weights_cpu.json

Weights are those of the blocks of the embedded video model. PSNR is of one clip for each audit seed
against the same loop with the weights as they are. What an earlier run wrote to `--output` and
`--work` is taken up again; `--only` measures some variants. `--latency ROUNDS` times layers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditopt.demo import demo_workload
from ditopt.environment import describe_environment
from ditopt.metrics import psnr
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import STORED_FORMATS, compute, derive
from ditopt.quantization.plans import candidates, uniform_plan
from ditopt.quantization.statistics import plan_tensors, watch
from ditopt.quantization.table import linear_rows, totals
from ditopt.timing import time_interleaved
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import load_workload

if TYPE_CHECKING:
    from ditopt.plan import Plan

MIN_ROWS = 256
CALLS = 20
FIRST_SEED = 5000

UNIFORM: dict[str, dict[str, Any]] = {
    "int4_group": {"format": "int4_group"},
    "twin_log": {"format": "twin_log"},
    "codebook": {"format": "codebook"},
    "int2_group": {"format": "int2_group"},
    "twin_log2": {"format": "twin_log2"},
    "int4_group, int8_row, rotate": {
        "format": "int4_group",
        "activation": "int8_row",
        "transform": "rotate",
    },
}
TIMED: dict[str, dict[str, Any]] = {
    "int8_row": {"format": "int8_row"},
    "int4_group": UNIFORM["int4_group"],
    "int4_group, int8_row": {"format": "int4_group", "activation": "int8_row"},
}


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


class Bench:
    """The trained model, its exact clips, and plans for it."""

    def __init__(self, work: Path, seeds: int) -> None:
        self.workload: Any = load_workload(demo_workload())
        ((self.name, self.model),) = self.workload.models.items()
        self.seeds = range(FIRST_SEED, FIRST_SEED + seeds)
        self._work = work
        work.mkdir(parents=True, exist_ok=True)
        torch.compiler.reset()
        args, kwargs = self.first_call()
        torch.compile(self.model, backend="ditopt_eager")(*args, **kwargs)
        self.graph = compiled_graphs(self.model)[-1]
        self.sites = candidates(self.graph, min_rows=MIN_ROWS)

    def first_call(self) -> tuple[Any, Any]:
        """Arguments of the loop's first call."""
        found: list[Any] = []

        def grab(*args: Any, **kwargs: Any) -> Any:
            found.append((args, kwargs))
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            self.workload.run(0, {self.name: grab})
        return found[0]

    def truth(self, seed: int) -> Tensor:
        """The clip of a seed, kept in the work folder."""
        return self._kept(f"clip{seed}", lambda: self.workload.run(seed, {self.name: self.model}))

    def statistics(self) -> dict[str, Tensor]:
        """What transforms need, from the loop of seed 0."""

        def record() -> dict[str, Tensor]:
            with watch(self.model) as seen:
                self.workload.run(0, {self.name: self.model})
            return plan_tensors(seen)

        return self._kept("statistics", record)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self._work / f"{name}.pt"
        if not path.exists():
            torch.save(make(), path)
        return torch.load(path)

    def uniform(self, fields: dict[str, Any]) -> Plan:
        """One rule at every layer of the blocks that has many rows."""
        rule = LinearRule.model_validate(fields)
        seen = self.statistics() if rule.transform != "none" else None
        return uniform_plan(self.model, self.graph, rule, self.sites, calls=CALLS, statistics=seen)

    def measure(self, plan: Plan, seed: int) -> tuple[float, float]:
        """PSNR of a seed's clip, and bf16 bytes of the layers over those that they hold."""
        torch.compiler.reset()
        run = torch.compile(self.model, backend="ditopt_eager", options={"plan": plan})
        clip = self.workload.run(seed, {self.name: run})
        size = totals(linear_rows(self.model, compiled_graphs(self.model)[-1]))
        quality = psnr(clip, self.truth(seed), self.workload.data_range)
        # The model is float32; half of its bytes are what bf16 takes.
        return quality, size["before"] / 2 / size["after"]


def latency(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Median milliseconds of one compiled layer [M, K, N] by rule, taking turns."""
    rows, k, n = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    plain = torch.compile(F.linear, dynamic=False)
    runs: dict[str, Any] = {"float32": lambda: plain(x, weight, bias)}
    for label, fields in TIMED.items():
        rule = LinearRule.model_validate(fields)
        made = derive(rule, [weight], [], {})

        def layer(x: Tensor, rule: LinearRule = rule, made: Any = made) -> Any:
            return compute(rule, x, made, bias, n=n, k=k, dtype=x.dtype, native=True)

        compiled = torch.compile(layer, dynamic=False)
        runs[label] = lambda f=compiled: f(x)
    times = time_interleaved(runs, rounds)
    return {"shape": shape, "ms": {label: spread.median_ms for label, spread in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for exact clips")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(UNIFORM))
    parser.add_argument("--latency", type=int, default=0, help="rounds; only that is measured")
    options = parser.parse_args()
    result: dict[str, Any] = {"clips": {}}
    if options.output.exists():
        result |= json.loads(options.output.read_text())

    def save() -> None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    if options.latency:
        shapes = ((4096, 256, 1024), (4096, 1024, 256))
        with torch.no_grad():
            result["layers"] = [latency(shape, options.latency) for shape in shapes]
        save()
        print(json.dumps(result["layers"], indent=1))
        return
    with torch.no_grad():
        bench = Bench(options.work, options.seeds)
        device = next(bench.model.parameters()).device
        result |= {"environment": describe_environment(device), "seeds": list(bench.seeds)}
        layers = [m for n, m in bench.model.named_modules() if n.startswith("blocks.")]
        if "weights" not in result:
            weights = [m.weight.detach().float() for m in layers if isinstance(m, nn.Linear)]
            result["weights"] = weights_table(weights)
            save()
        for seed, label in itertools.product(bench.seeds, options.only):
            row = result["clips"].setdefault(label, {"psnr_db": {}})
            if str(seed) not in row["psnr_db"]:
                plan = bench.uniform(UNIFORM[label])
                row["psnr_db"][str(seed)], row["smaller"] = bench.measure(plan, seed)
                print(label, row, flush=True)
                save()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
