"""Measure and fit what one call of each CPU attention executor costs: `costs` in configs.yaml.

    python benchmarks/attention_costs_cpu.py --date 2026-11-21 --write --output results.json

Float32, processor time of one thread, which other programs hardly change; executors take turns over
all densities, and each time is the least of several. Gate: every result is within twice the error
of the float32 reference against fp64 (one head). The fit and the file are those of
`attention_costs.py`; `processors` is 1, and `dispatch` counts threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path += [str(Path(__file__).resolve().parents[k]) for k in (1, 0)]

from attention_costs import table, written
from attention_cpu import gate, random_lists

from ditopt.executors import target_of
from ditopt.kernels.block_sparse_attention import cpu_native, ops
from ditopt.kernels.block_sparse_attention.configs import FILE

BATCH, HEADS = 2, 4
SIZES = ((512, 64), (2048, 64))
BLOCKS = ((128, 128), (64, 64))
DENSITIES = (1.0, 0.25, 0.125)
SMALL = 64  # tokens of a call whose time is the host's


def least_ms(calls: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Least processor time of each call, in turns."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], (time.process_time() - start) * 1e3)
    return found


def calls_of(
    n: int, d: int, block: tuple[int, int], density: float, flex: Callable[..., Tensor]
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Executors on one call's arguments after the gate, and the work that it is."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, n, HEADS, d).transpose(1, 2) for _ in "qkv")
    counts, ids = random_lists(n, *block, density)
    args = (q, k, v, counts, ids, *block, d**-0.5)
    out = ops.empty_output(q, v)
    calls: dict[str, Callable[[], object]] = {
        "cpu": partial(cpu_native.forward, *args, out),
        "flex": partial(flex, *args),
    }
    calls["cpu"]()
    gate("cpu", out, args)
    with torch.no_grad():
        gate("flex", flex(*args), args)
    if density == 1.0:
        calls["sdpa"] = partial(scaled_dot_product_attention, q, k, v)
    return calls, {"rows": BATCH * counts.numel(), "entries": BATCH * int(counts.sum())}


@torch.no_grad()
def measure(rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of (executor, block, channels, query blocks, kept blocks, ms) and host times."""
    rows: list[dict[str, Any]] = []
    hosts: dict[str, float] = {}
    for n, d in ((SMALL, 64), *SIZES):
        for block in BLOCKS if n > SMALL else ((SMALL, SMALL),):
            torch._dynamo.reset()
            flex = torch.compile(target_of("flex"), dynamic=False)
            calls, works = {}, {}
            for density in DENSITIES if n > SMALL else (1.0,):
                found, works[density] = calls_of(n, d, block, density, flex)
                calls |= {(name, density): call for name, call in found.items()}
            times = least_ms(calls, rounds)
            if n == SMALL:
                hosts = {name: ms * 1e3 for (name, _), ms in times.items()}
                continue
            rows += [
                {"executor": name, "channels": d, "tokens": n, "block": block}
                | {**works[density], "ms": ms}
                for (name, density), ms in times.items()
            ]
            print(f"# {n} x {d}, {block}", flush=True)
    return rows, hosts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into configs.yaml")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--date", required=True, help="of this run, written into the report")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows, hosts = measure(options.rounds)
    lines = table(rows, hosts, 1)
    print("cpu:", *lines, sep="\n")
    report = {
        "date": options.date,
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "dtype": "float32",
        "rounds": options.rounds,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "host_us": hosts,
        "results": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.write:
        FILE.write_text(written(FILE.read_text(), "cpu", lines))


if __name__ == "__main__":
    main()
