"""Is every launch of the attention kernels the same, alone on the GPU and with others beside?

    python benchmarks/attention_repeated.py --output benchmarks/results/attention_repeated_h200.json

Several processes on one GPU take turns at it: programs are stopped anywhere and go on later, which
opens windows that a kernel alone meets seldom. Every output must equal the first in every number,
in memory that held NaN before: a tile that nobody wrote shows, too. 12 heads, 32,768 tokens, lists
of density 0.05.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attention import DATE, random_lists

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ditopt.kernels.block_sparse_attention import hopper, triton

HEADS, TOKENS, DENSITY, AT_A_TIME = 12, 32768, 0.05, 10
BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64))
SIZES = (128, 112, 96, 80, 72, 64, 32)


def cases() -> list[tuple[str, int, int, int]]:
    """(kernel, block_q, block_k, head size)."""
    ours = [("gluon", *blocks, d) for blocks in BLOCKS for d in SIZES]
    return ours + [("triton", 128, 128, d) for d in SIZES]


def repeat(case: tuple[str, int, int, int], seconds: float) -> dict[str, Any]:
    """Launches within ``seconds``, and those of them whose output was not the usual one."""
    kernel, block_q, block_k, d = case
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(
            1, TOKENS, HEADS, d, device="cuda", dtype=torch.bfloat16, generator=generator
        ).transpose(1, 2)
        for _ in range(3)
    )
    lists = random_lists([DENSITY] * HEADS, TOKENS, block_q, block_k)
    forward: Callable[..., Any] = hopper.forward if kernel == "gluon" else triton.forward
    run = partial(forward, q, k, v, *lists, block_q, block_k, d**-0.5)
    torch.full_like(q, float("nan"))  # whose memory is the next output's
    usual = run()[0].clone()
    for _ in range(4):  # the first may be an unusual one itself
        torch.full_like(q, float("nan"))
        again = run()[0]
        usual = torch.where(usual.isnan() | (again == usual), again, usual)
    launches, unusual, tiles = 0, 0, 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        differs = []
        for _ in range(AT_A_TIME):
            torch.full_like(q, float("nan"))
            rows = (run()[0] != usual).any(-1).view(HEADS, -1, 64)
            differs.append(rows.any(-1).sum())
        for count in torch.stack(differs).tolist():
            launches, unusual, tiles = launches + 1, unusual + bool(count), tiles + int(count)
    return {"launches": launches, "unusual": unusual, "unusual_tiles_of_64_rows": tiles}


def work(number: int, processes: int, seconds: float, queue: Any) -> None:
    """One process: all cases, each process beginning at another one."""
    todo = cases()
    first = number * len(todo) // processes
    found = [(case, repeat(case, seconds)) for case in todo[first:] + todo[:first]]
    queue.put(found)


def together(processes: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each case, summed over the processes."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    started = [
        context.Process(target=work, args=(n, processes, seconds, queue)) for n in range(processes)
    ]
    for process in started:
        process.start()
    enough = 120 + 10 * seconds * len(cases())  # a process that died gives no answer
    found = [dict(queue.get(timeout=enough)) for _ in started]
    for process in started:
        process.join()
    rows = []
    for case in cases():
        totals = {key: sum(one[case][key] for one in found) for key in found[0][case]}
        names = dict(zip(("kernel", "block_q", "block_k", "head_size"), case, strict=True))
        rows.append({"processes": processes, **names, **totals})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case in each process")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for processes in options.processes:
        rows += together(processes, options.seconds)
        those = [row for row in rows if row["processes"] == processes]
        launches, unusual = (sum(row[key] for row in those) for key in ("launches", "unusual"))
        print(f"{processes} processes: {launches} launches, {unusual} unusual", flush=True)
        for row in those:
            if row["unusual"]:
                print("  ", row)
    if options.output:
        report = {
            "date": DATE,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "shape": [HEADS, TOKENS],
            "density": DENSITY,
            "rows": rows,
        }
        if options.output.exists():
            before = json.loads(options.output.read_text())
            report |= {key: before[key] for key in before if key not in report}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
