"""What a profile costs: processor time of one observed seed against one plain loop.

    python benchmarks/profile_cost.py --output benchmarks/results/profile_cost_cpu.json

Processor time and not wall time, on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import torch

from ditopt.demo import demo_workload
from ditopt.environment import describe_environment
from ditopt.observe import observe
from ditopt.plan import Block
from ditopt.profiling.loops import layout_of, observed_loop, only_model, plain_loop
from ditopt.profiling.observer import ProfileObserver
from ditopt.profiling.run import ProfileSpec
from ditopt.workload import load_workload


def processor_s(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result and its seconds of processor time."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def main() -> None:
    """Measure on the embedded video model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--observed-calls", type=int, default=ProfileSpec().observed_calls)
    args = parser.parse_args()
    torch.set_num_threads(1)
    workload = load_workload(demo_workload())
    model = only_model(workload)
    plain_loop(workload)
    (trace, inputs), plain_s = processor_s(lambda: plain_loop(workload))
    calls = torch.linspace(0, trace.calls_per_branch - 1, args.observed_calls).round().int()
    observer = ProfileObserver(
        layout_of(workload, inputs),
        Block(q=64, k=64),
        trace.calls_per_branch,
        calls.tolist(),
        trace.branches,
        ProfileSpec().memory_bytes,
    )
    observed = observe(model, observer)
    seeds = []
    for seed in range(2):  # the first captures the graph, too
        _, seconds = processor_s(
            lambda seed=seed: observed_loop(workload, seed, trace, observer, observed)
        )
        seeds.append(seconds)
    found = {
        "environment": describe_environment(next(model.parameters()).device),
        "calls": trace.calls_per_branch,
        "observed_calls": observer.observed_calls,
        "options": len(observer.options),
        "orders": len(observer.choices.orders),
        "selectors": len(observer.selectors),
        "plain_loop_s": round(plain_s, 2),
        "observed_loop_s": [round(seconds, 2) for seconds in seeds],
        "ratio": [round(seconds / plain_s, 3) for seconds in seeds],
    }
    text = json.dumps(found, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
