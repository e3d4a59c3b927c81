"""Attention on one GPU: ours, cuDNN, FlashAttention-2 and -4, compiled FlexAttention, equal lists.

    python benchmarks/attention.py --output benchmarks/results/attention_h200.json

A time is printed only after the correctness gate of the same run: every implementation, on every
case, must be within twice the error that the bf16 reference itself has against fp64 (one head), an
8-bit one within 1.1 of its own reference's. Density is measured from the lists. Efficiency is
(cuDNN dense time / time) x density: 1.00 is a kernel that is as fast as cuDNN on the pairs it
keeps. 8-bit rows count the quantisation, whose time stands beside. `dispatched` repeats the row of
the executor that `dispatch` chooses, among all and among those that need no extra package;
`--choose-again` does only that, on any machine, after new costs. Medians and 20th to 80th
percentiles of CUDA events. A run for some shapes replaces only their rows in the output, a run for
some implementations (`--only`) only theirs, which then hold the dense times they were divided by.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ditopt.kernels.block_sparse_attention import (
    dispatch,
    fa4,
    flex,
    ops,
    reference,
    reference_8bit,
)

Lists = tuple[Tensor, Tensor]
MIXED = [0.05, 0.05, 0.1, 0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0]
DATE = "2026-11-21"
SHAPES = {  # heads, tokens, channels
    "Wan 32768x128": (12, 32768, 128),
    "24x32768x64": (24, 32768, 64),
    "24x118784x128": (24, 118784, 128),
}
EXECUTORS = {  # rows' names for the names of `dispatch`
    "gluon": "ours",
    "triton": "ours, plain Triton",
    "flex": "FlexAttention, compiled",
    "fa4": "FlashAttention-4",
    "sdpa": "cuDNN dense",
    "fa4_dense": "FlashAttention-4 dense",
}
EIGHT_BIT = {"ours, int8 QK": False, "ours, int8 QK and e4m3 PV": True}


def random_lists(densities: list[float], n: int, block_q: int, block_k: int) -> Lists:
    """Lists [1, H, QB, KB]: head h keeps round(densities[h] * KB) random blocks of every row.

    KB is the full width, so that one FlexAttention program serves every density.
    """
    rows, width = -(-n // block_q), -(-n // block_k)
    generator = torch.Generator("cuda").manual_seed(0)
    counts = torch.empty(1, len(densities), rows, dtype=torch.int32, device="cuda")
    ids = torch.zeros(1, len(densities), rows, width, dtype=torch.int32, device="cuda")
    for head, density in enumerate(densities):
        kept = max(1, round(density * width))
        noise = torch.rand(rows, width, generator=generator, device="cuda")
        counts[0, head] = kept
        ids[0, head, :, :kept] = noise.argsort(-1)[:, :kept].sort(-1).values
    return counts, ids


def time_ms(run: Callable[[], object]) -> dict[str, float]:
    """Median and spread of one call in milliseconds."""
    from triton.testing import do_bench

    low, median, high = do_bench(run, warmup=30, rep=150, quantiles=[0.2, 0.5, 0.8])
    return {"ms": median, "ms_p20": low, "ms_p80": high}


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def relative_error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


def compiled_flex(block_q: int, block_k: int, scale: float) -> Callable[..., Tensor]:
    """FlexAttention as a pass emits it: a call_function node, lowered by Inductor."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("q", "k", "v", "counts", "ids")]
    node = graph.call_function(flex.block_sparse_attention, (*inputs, block_q, block_k, scale))
    graph.output((node,))
    compiled = torch.compile(torch.fx.GraphModule({}, graph), fullgraph=True, dynamic=False)
    return lambda *args: compiled(*args[:5])[0]


def candidates(
    q: Tensor, block_q: int, block_k: int, only: list[str]
) -> dict[str, Callable[..., Tensor]]:
    """Implementations with the operator's signature, or ``only`` these of ours."""
    from ditopt.kernels.block_sparse_attention import triton as kernel

    found: dict[str, Callable[..., Tensor]] = {"ours": ops.call, "ours, plain Triton": kernel.plain}
    if only:
        return {label: call for label, call in found.items() if label in only}
    found[EXECUTORS["flex"]] = compiled_flex(block_q, block_k, q.shape[-1] ** -0.5)
    if fa4.reason_to_decline(q, block_q, block_k) is None:
        found[EXECUTORS["fa4"]] = torch.ops.ditopt.block_sparse_attention_fa4.default
    return found


def eight_bit(
    args: tuple[Any, ...], head: tuple[Any, ...], truth: Tensor, label: str, case: dict[str, Any]
) -> dict[str, Any]:
    """Times and error of one 8-bit form; stops the program when its gate is red."""
    from ditopt.kernels.block_sparse_attention import hopper_8bit
    from ditopt.kernels.block_sparse_attention.quantize import quantize

    values = EIGHT_BIT[label]
    q, k, v, counts, ids, block_q, block_k, scale = args
    own = relative_error(
        reference_8bit.block_sparse_attention_8bit(*head, *args[5:], values=values), truth
    )
    error = relative_error(hopper_8bit.forward(*args, values=values)[:, -1:], truth)
    if not error <= 1.1 * own:
        raise SystemExit(f"gate: {label}, {case}: error {error}, its reference's {own}")
    operands = quantize(q, k, v, block_k, scale, values=values)
    out = ops.empty_output(q, v)
    attend = partial(hopper_8bit.forward_quantized, operands, out, counts, ids, block_q, block_k)
    prepare = partial(quantize, q, k, v, block_k, scale, values=values)
    times = time_ms(partial(hopper_8bit.forward, *args, values=values))
    parts = {"quantize_ms": time_ms(prepare)["ms"], "attend_ms": time_ms(attend)["ms"]}
    return {"error": error, "error_of_reference": own, **times, **parts}


def load_bound(args: tuple[Any, ...]) -> dict[str, Any]:
    """The kernel's loads alone: what no arithmetic can be faster than."""
    from attention_loads import loads

    q, k, v, counts, ids, block_q, block_k, _ = args
    times = time_ms(partial(loads, q, k, v, counts, ids, block_q, block_k))
    moved = int(counts.sum()) * block_k * q.shape[-1] * 4
    return {**times, "tb_per_s": moved / times["ms"] / 1e9}


def choose_again(results: list[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """The results with `dispatched` rows after each set of lists, chosen among what was timed."""
    measured = [row for row in results if not row["implementation"].startswith("dispatched")]
    by_lists: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in measured:
        if "efficiency" in row:
            key = (row["shape"], *row["block"], row["lists"], row["density"])
            by_lists.setdefault(key, []).append(row)
    chosen = {id(rows[-1]): _chosen(rows, measured, gpu) for rows in by_lists.values()}
    return [r for row in measured for r in (row, *chosen.get(id(row), ()))]


def _chosen(
    rows: list[dict[str, Any]], measured: list[dict[str, Any]], gpu: str
) -> list[dict[str, Any]]:
    first = rows[0]
    heads, n, d = SHAPES[first["shape"]]
    found = {row["implementation"]: row for row in rows}
    for row in measured:
        if first["density"] == 1.0 and row["shape"] == first["shape"] and "tflops" in row:
            found[row["implementation"]] = {**first, **row, "efficiency": row["speedup_over_cudnn"]}
    missing = {e: "not timed" for e, label in EXECUTORS.items() if label not in found}
    site = dispatch.Site(1, n, n, d, *first["block"], (first["density"],) * heads)
    result = []
    for label, left_out in (("dispatched", ()), ("dispatched, no extras", ("fa4", "fa4_dense"))):
        executor = dispatch.choose(site, gpu, {**missing, **dict.fromkeys(left_out, "")}).executor
        row = found[EXECUTORS[executor]]
        result.append({**row, "implementation": label, "executor": executor})
    return result


def dense_rows(name: str, heads: int, q: Tensor, k: Tensor, v: Tensor) -> list[dict[str, Any]]:
    """cuDNN, FlashAttention-2 and, where installed, -4."""
    n, d = q.shape[2:]
    calls = {
        "cuDNN dense": partial(dense, SDPBackend.CUDNN_ATTENTION, q, k, v),
        "FlashAttention-2 dense": partial(dense, SDPBackend.FLASH_ATTENTION, q, k, v),
    }
    if fa4.reason_to_decline(q, 128, 128) is None:
        calls["FlashAttention-4 dense"] = partial(fa4.dense, q, k, v, d**-0.5)
    timed = {label: time_ms(call) for label, call in calls.items()}
    flops, base = 4.0 * heads * n * n * d, timed["cuDNN dense"]["ms"]
    return [
        {"shape": name, "implementation": label, "density": 1.0, **times}
        | {"tflops": flops / times["ms"] / 1e9, "speedup_over_cudnn": base / times["ms"]}
        for label, times in timed.items()
    ]


def run_case(
    name: str, heads: int, n: int, d: int, cases: list[dict[str, Any]], only: list[str]
) -> list[dict[str, Any]]:
    """Implementations (``only`` these, if any) on all lists of one shape.

    Stops the program when the gate is red.
    """
    torch.manual_seed(0)
    shape = (1, n, heads, d)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    )
    results = dense_rows(name, heads, q, k, v)
    base, flash = (row["ms"] for row in results[:2])
    print(*map(row, results), sep="\n", flush=True)
    implementations: dict[tuple[int, int], dict[str, Callable[..., Tensor]]] = {}
    for case in cases:
        block_q, block_k = blocks = case["block"]
        counts, ids = random_lists(case["densities"](heads), n, *blocks)
        density = float(counts.float().mean()) / ids.shape[-1]
        rest = (block_q, block_k, d**-0.5)
        if blocks not in implementations:
            implementations[blocks] = candidates(q, *blocks, only)
        head = (q[:, -1:], k[:, -1:], v[:, -1:], counts[:, -1:], ids[:, -1:])
        truth = reference.block_sparse_attention(*(x.double() for x in head[:3]), *head[3:], *rest)
        own = relative_error(reference.block_sparse_attention(*head, *rest), truth)
        args = (q, k, v, counts, ids, *rest)
        rows: list[dict[str, Any]] = []
        for label, call in implementations[blocks].items():
            error = relative_error(call(*args)[:, -1:], truth)
            if not error <= 2 * own:
                raise SystemExit(f"gate: {label}, {name}, {case}: error {error}, budget {2 * own}")
            rows.append({"implementation": label, "error": error, **time_ms(partial(call, *args))})
        if case.get("eight_bit") and not only:
            for label in EIGHT_BIT:
                measured = eight_bit(args, head, truth, label, case)
                rows.append({"implementation": label, **measured})
        for found in rows:
            results.append(
                {"shape": name, "block": [block_q, block_k], "lists": case["name"]}
                | {"density": density, **found}
                | {
                    "speedup_over_cudnn": base / found["ms"],
                    "speedup_over_fa2": flash / found["ms"],
                }
                | {"efficiency": base / found["ms"] * density}
                | ({"cudnn_ms": base, "fa2_ms": flash} if only else {})
            )
            print(row(results[-1]), flush=True)
        if blocks != (128, 128):
            bound = load_bound(args)
            share = bound["ms"] / rows[0]["ms"]
            results.append(
                {"shape": name, "implementation": "loads alone", "block": [block_q, block_k]}
                | {"lists": case["name"], "density": density, **bound, "share_of_bound": share}
            )
            print(row(results[-1]), f"ours reaches {share:.3f} of it", flush=True)
    return results


def replaced(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``before`` with the sparse rows of a run for some implementations in their places."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["shape"], row["implementation"], *row["block"], row["lists"], row["density"]

    new = {key(row): {**row, "date": DATE} for row in rows if "block" in row}
    kept = [new.pop(key(row), row) if "block" in row else row for row in before]
    return kept + list(new.values())


def row(result: dict[str, Any]) -> str:
    return (
        f"{result['shape']:<16}{result['implementation']:<26}{result.get('block', '')!s:<12}"
        f"{result.get('lists', ''):<8}{result['density']:<8.3f}{result['ms']:<10.3f}"
        f"{result.get('efficiency', float('nan')):<8.3f}{result.get('error', float('nan')):.2e}"
    )


def uniform(
    density: float, block: tuple[int, int] = (128, 128), *, eight_bit: bool = False
) -> dict[str, Any]:
    case = {"name": "equal", "block": block, "densities": lambda heads: [density] * heads}
    return {**case, "eight_bit": eight_bit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--choose-again", action="store_true", help="time nothing")
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this")
    parser.add_argument(
        "--only", default=[], action="append", choices=["ours", EXECUTORS["triton"]]
    )
    options = parser.parse_args()
    if options.choose_again:
        report = json.loads(options.output.read_text())
        report["results"] = choose_again(report["results"], report["gpu"])
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        return
    sparse = [uniform(d, eight_bit=d == 0.25) for d in (0.5, 0.25, 0.1, 0.05)]
    plain = [uniform(d) for d in (0.5, 0.25, 0.1, 0.05)]
    mixed = {"name": "mixed", "block": (128, 128), "densities": lambda heads: MIXED * (heads // 12)}
    other = [uniform(0.25, (128, 64)), uniform(0.25, (64, 64))]
    whole = uniform(1.0, eight_bit=True)
    everything = [whole, *sparse, mixed, *other]
    cases = {name: plain if "118784" in name else everything for name in SHAPES}
    import triton

    gpu = torch.cuda.get_device_name()
    report = {
        "date": DATE,
        "gpu": gpu,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "flash-attn-4": version("flash-attn-4") if fa4.installed() else None,
        },
        "dtype": "bfloat16",
        "layout": "q, k, v are [B, H, N, D] views of [B, N, H, D]",
        "results": [],
    }
    if options.output and options.output.exists():
        before = json.loads(options.output.read_text())
        if options.only:
            report = before
        names = {name for name in SHAPES if options.only or options.shapes not in name}
        report["results"] = [row for row in before["results"] if row["shape"] in names]
    for name, shape in SHAPES.items():
        if options.shapes not in name:
            continue
        rows = run_case(name, *shape, cases[name], options.only)
        if options.only:
            report["results"] = replaced(report["results"], rows)
        else:
            report["results"] += rows
        report["results"] = choose_again(report["results"], gpu)
        torch._dynamo.reset()
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
