"""Measure and fit what one call of each attention executor costs: `costs` in configs.yaml.

    python benchmarks/attention_costs.py --write
    ... --only gluon triton          # the others keep the costs that they have

Device time comes from replays of a CUDA graph (small kernels would otherwise show the host), host
time from calls that nothing waits for. Long sequences come from the recorded results of
`benchmarks/attention.py` on the same GPU. The fit is of relative error, of long
calls a little more, coefficients not negative:
microseconds = start + (tile x query blocks + entry x kept blocks) / processors. See
`ditopt/kernels/block_sparse_attention/dispatch.py`, which reads the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path += [str(Path(__file__).resolve().parents[k]) for k in (1, 0)]

from attention import EXECUTORS, compiled_flex, random_lists, relative_error
from attention import SHAPES as ATTENTION_SHAPES

from ditopt.kernels.block_sparse_attention import fa4, reference
from ditopt.kernels.block_sparse_attention.configs import FILE

SHAPES = (  # batch, heads, tokens, channels
    (1, 8, 512, 128),
    (1, 24, 1024, 128),
    (1, 24, 4608, 128),
    (1, 12, 16384, 128),
    (2, 4, 512, 64),
    (8, 16, 1024, 64),
    (1, 16, 4096, 64),
    (1, 24, 16384, 64),
)
BLOCKS = ((128, 128), (128, 64), (64, 64))
FLEX_TOKENS = (1024, 4608)  # each shape is a compilation
RESULTS = Path(__file__).resolve().parent / "results"
ERROR = 4e-3  # twice what bf16's own rounding costs


def replay_ms(run: Callable[[], object], replays: int = 12) -> float:
    """Median device time of one call, from a graph of several."""
    run()
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 4
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    graph.replay()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in events) / calls


def host_us(run: Callable[[], object], calls: int = 100) -> float:
    """Host time of one call, with the device far behind or idle."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def executors(args: tuple[Any, ...], tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Executors on one call's arguments, by the names that `dispatch` gives them."""
    from ditopt.kernels.block_sparse_attention import hopper, triton

    block_q, block_k, scale = args[5:]
    found: dict[str, Callable[[], Tensor]] = {
        "gluon": lambda: hopper.forward(*args)[0],
        "triton": lambda: triton.forward(*args)[0],
    }
    if tokens in FLEX_TOKENS and block_q == block_k:
        found["flex"] = partial(compiled_flex(block_q, block_k, scale), *args)
    if fa4.reason_to_decline(args[0], block_q, block_k) is None:
        found["fa4"] = partial(torch.ops.ditopt.block_sparse_attention_fa4.default, *args)
    return found


def measure(only: Collection[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of (executor, block, channels, query blocks, kept blocks, ms) and host times."""
    rows: list[dict[str, Any]] = []
    hosts: dict[str, float] = {}
    for batch, heads, n, d in SHAPES:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(batch, n, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in "qkv"
        )
        blocks_in_all = batch * heads * (n // 128) ** 2
        dense = partial(scaled_dot_product_attention, q, k, v)
        size = {"channels": d, "tokens": n, "block": (128, 128)}
        work = {"rows": batch * heads * (n // 128), "entries": blocks_in_all}
        if "sdpa" in only:
            rows.append({"executor": "sdpa", **size, **work, "ms": replay_ms(dense)})
            hosts.setdefault("sdpa", host_us(dense))
        if "fa4_dense" in only and fa4.reason_to_decline(q, 128, 128) is None:
            dense = partial(fa4.dense, q, k, v, d**-0.5)
            rows.append({"executor": "fa4_dense", **size, **work, "ms": replay_ms(dense)})
            hosts.setdefault("fa4_dense", host_us(dense))
        for block in BLOCKS if n in (4608, 16384, 1024, 4096) else BLOCKS[:1]:
            for density in (1.0, 0.25, 0.1):
                counts, ids = random_lists([density] * heads, n, *block)
                args = (q, k, v, counts, ids, *block, d**-0.5)
                head = (q[:1, -1:], k[:1, -1:], v[:1, -1:], counts[:, -1:], ids[:, -1:])
                truth = reference.block_sparse_attention(
                    *(x.double() for x in head[:3]), *head[3:], *args[5:]
                )
                for name, run in executors(args, n).items():
                    if name not in only:
                        continue
                    if not relative_error(run()[:1, -1:], truth) <= ERROR:
                        raise SystemExit(f"gate: {name} is wrong on {n} x {d}, {block}")
                    if n == 512 or name == "flex":
                        hosts.setdefault(name, host_us(run))
                    rows.append(
                        {"executor": name, "channels": d, "tokens": n, "block": block}
                        | {"rows": batch * counts.numel(), "entries": batch * int(counts.sum())}
                        | {"ms": replay_ms(run)}
                    )
        print(f"# {batch} x {heads} x {n} x {d}", flush=True)
    return rows, hosts


def recorded(gpu: str, only: Collection[str]) -> list[dict[str, Any]]:
    """Rows of the recorded results of `benchmarks/attention.py` on this GPU."""
    executor_of = {label: name for name, label in EXECUTORS.items() if name in only}
    rows = []
    for path in (p for p in RESULTS.glob("attention_*.json") if p.stem.count("_") == 1):
        report = json.loads(path.read_text())
        for row in report["results"] if report.get("gpu") == gpu else []:
            if row["implementation"] in executor_of and row.get("lists", "equal") == "equal":
                heads, n, d = ATTENTION_SHAPES[row["shape"]]
                block = tuple(row.get("block", (128, 128)))
                blocks = heads * -(-n // block[0]), -(-n // block[1])
                rows.append(
                    {"executor": executor_of[row["implementation"]], "channels": d, "tokens": n}
                    | {"block": block, "rows": blocks[0], "ms": row["ms"]}
                    | {"entries": blocks[0] * blocks[1] * row["density"]}
                )
    return rows


def fit(rows: list[dict[str, Any]], processors: int) -> tuple[np.ndarray, float]:
    """(start, tile, entry) in microseconds and the median relative error."""
    times = np.array([row["ms"] * 1e3 for row in rows])
    design = np.array([[1, r["rows"] / processors, r["entries"] / processors] for r in rows])
    weight = times**0.25  # a wrong choice costs more where calls are long
    found, _ = nnls(design / times[:, None] * weight[:, None], weight)
    return found, float(np.median(np.abs(design @ found / times - 1)))


def table(rows: list[dict[str, Any]], hosts: dict[str, float], processors: int) -> list[str]:
    """The lines of `costs`, one for each executor, block size and head size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["executor"], row["block"], row["channels"]), []).append(row)
    lines = ["  costs:"]
    for (name, block, channels), group in groups.items():
        (start, tile, entry), error = fit(group, processors)
        lines.append(
            f"    - {{executor: {name}, block: [{block[0]}, {block[1]}], channels: {channels}, "
            f"processors: {processors}, host: {hosts[name]:.0f}, start: {start:.1f}, "
            f"tile: {tile:.3f}, entry: {entry:.4f}}}  # {len(group)} times, off by {error:.0%}"
        )
    return lines


def written(text: str, gpu: str, lines: list[str]) -> str:
    """The file with these costs in the GPU's section, in place of those of the same executors."""
    kept: list[str] = []
    others: list[str] = []
    here = skipping = False
    new = {_executor(line) for line in lines}
    for line in text.splitlines():
        if line and not line.startswith((" ", "#")):
            here = line == f"{gpu}:"
        if not line.startswith("    "):
            skipping = here and line == "  costs:"
        if not skipping:
            kept.append(line)
        elif _executor(line) and _executor(line) not in new:
            others.append(line)
    if f"{gpu}:" not in kept:
        kept.append(f"{gpu}:")
    at = kept.index(f"{gpu}:") + 1
    return "\n".join([*kept[:at], *lines, *others, *kept[at:]]) + "\n"


def _executor(line: str) -> str:
    """Whose costs a line has; empty for other lines."""
    return line.partition("{executor: ")[2].partition(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into configs.yaml")
    parser.add_argument("--only", nargs="+", choices=EXECUTORS, default=list(EXECUTORS))
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    rows, hosts = measure(options.only)
    lines = table(
        [*rows, *recorded(gpu, options.only)],
        hosts,
        torch.cuda.get_device_properties(0).multi_processor_count,
    )
    print(f"{gpu}:", *lines, *(f"# {row}" for row in rows), sep="\n")
    if options.write:
        FILE.write_text(written(FILE.read_text(), gpu, lines))


if __name__ == "__main__":
    main()
