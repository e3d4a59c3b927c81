"""Block-sparse attention on a CPU: compiled C++ and the gathering fallback, over dense SDPA.

    python benchmarks/attention_cpu.py --date 2026-11-21 --output results/attention_cpu.json

Float32, two threads. Implementations take turns, so that load from other programs meets all of
them; a speedup is of medians and of minima. Gate: every result is within twice the error of the
float32 reference against fp64 (one head).
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
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ditopt.kernels.block_sparse_attention import cpu, cpu_native, lists, ops, reference

BATCH, HEADS, D = 2, 4, 64
CASES = [
    (4096, 128, 128, 0.25),
    (4096, 64, 64, 0.25),
    (4096, 128, 128, 0.1),
    (2048, 128, 128, 0.25),
]


def random_lists(n: int, block_q: int, block_k: int, density: float) -> tuple[Tensor, Tensor]:
    rows, width = n // block_q, n // block_k
    chosen = torch.rand(1, HEADS, rows, width).argsort(-1).argsort(-1)
    return lists.from_blocks(chosen < max(1, round(density * width)))


def gate(label: str, out: Tensor, args: tuple[Any, ...]) -> float:
    """Relative error of the last head of the first batch."""
    q, k, v, counts, ids, *rest = args
    head = [x[:1, -1:] for x in (q, k, v, counts, ids)]
    truth = reference.block_sparse_attention(*(x.double() for x in head[:3]), *head[3:], *rest)
    own, error = (
        float((x.double() - truth).norm() / truth.norm())
        for x in (reference.block_sparse_attention(*head, *rest), out[:1, -1:])
    )
    if not error <= 2 * own:
        raise SystemExit(f"gate: {label}: error {error}, budget {2 * own}")
    return error


def run(n: int, block_q: int, block_k: int, density: float, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, n, HEADS, D).transpose(1, 2) for _ in "qkv")
    counts, ids = random_lists(n, block_q, block_k, density)
    args = (q, k, v, counts, ids, block_q, block_k, D**-0.5)
    out = ops.empty_output(q, v)
    calls: dict[str, Callable[[], object]] = {
        "dense SDPA": partial(scaled_dot_product_attention, q, k, v),
        "C++": partial(cpu_native.forward, *args, out),
        "gather": partial(cpu.block_sparse_attention, *args, out),
    }
    errors = {}
    for label in ("C++", "gather"):
        out.fill_(float("nan"))
        calls[label]()
        errors[label] = gate(label, out, args)
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            times[label].append((time.perf_counter() - start) * 1e3)
    dense = times["dense SDPA"]
    shape = {"shape": [BATCH, HEADS, n, D], "block": [block_q, block_k]}
    return [
        {**shape, "implementation": label, "error": errors.get(label)}
        | {"density": 1.0 if label == "dense SDPA" else float(counts.float().mean()) * block_k / n}
        | {"ms": median(found), "ms_min": min(found), "ms_max": max(found)}
        | {"speedup": median(dense) / median(found), "speedup_of_minima": min(dense) / min(found)}
        for label, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--date", required=True, help="of this run, written into the report")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "date": options.date,
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "dtype": "float32",
        "rounds": options.rounds,
        "load_before": os.getloadavg()[0],
        "results": [],
    }
    for case in CASES:
        rows = run(*case, options.rounds)
        report["results"] += rows
        for row in rows:
            print(
                f"{row['shape']!s:<20}{row['block']!s:<12}{row['implementation']:<12}"
                f"{row['density']:<7.3f}{row['ms']:<9.1f}{row['ms_min']:<9.1f}"
                f"{row['speedup']:<7.2f}{row['speedup_of_minima']:.2f}",
                flush=True,
            )
    report["load_after"] = os.getloadavg()[0]
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
