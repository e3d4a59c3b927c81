"""What the plain Triton kernel's options cost on one GPU, its backward, and its head sizes.

    python benchmarks/attention_features.py --output benchmarks/results/attention_features_h200.json

Gate: before its time is printed, each result of one head is compared with the fp64 reference and
must be within twice the error of the bf16 reference. Options are compared with the same kernel on
the same lists without them; means are timed apart. Backward is compared with cuDNN's dense one:
efficiency = its time / ours x density. Head sizes stand beside those of the Gluon kernel and of
cuDNN's and FlashAttention-2's dense ones, and have their bound, measured in the same run: the
slower of the plain kernel's softmax alone and its products alone (`attention_parts`), and the share
of it that the kernel reaches. Medians and 20th to 80th percentiles of CUDA events, bf16. A run for
some parts replaces only their rows in the output.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.attention import dense, random_lists, relative_error, time_ms
from ditopt.kernels.block_sparse_attention import hopper, lists, ops_lse, pooling, reference
from ditopt.kernels.block_sparse_attention import triton as kernel
from ditopt.kernels.block_sparse_attention import triton_backward as backward
from ditopt.kernels.block_sparse_attention.triton_lists import transpose

DENSITIES = (0.5, 0.25, 0.1, 0.05)
BLOCK = 128
Row = dict[str, Any]


def operands(heads: int, n: int, d: int) -> tuple[Tensor, ...]:
    """q, k, v as views of [1, N, H, D] memory."""
    torch.manual_seed(0)
    shape = (1, n, heads, d)
    return tuple(
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    )


def gate(label: str, out: Tensor, args: tuple[Any, ...]) -> float:
    """Relative error of the last head against fp64; ends the program where it is too large."""

    def last(x: Any) -> Any:
        if isinstance(x, lists.Partial | lists.Pooled):
            return type(x)(*(y if name == "masks" else last(y) for name, y in x._asdict().items()))
        return x[:, -1:] if isinstance(x, Tensor) and x.ndim >= 3 else x

    head = tuple(map(last, args))
    wide = tuple(
        x._replace(k=x.k.double(), v=x.v.double()) if isinstance(x, lists.Pooled) else x
        for x in head[3:]
    )
    truth = reference.block_sparse_attention_with_lse(*(x.double() for x in head[:3]), *wide)[0]
    own = relative_error(reference.block_sparse_attention_with_lse(*head)[0], truth)
    error = relative_error(out[:, -1:], truth)
    if not error <= 2 * own:
        raise SystemExit(f"gate: {label}: error {error}, budget {2 * own}")
    return error


def partly(counts: Tensor, ids: Tensor, share: float) -> tuple[Tensor, lists.Partial]:
    """The last ``share`` of every list as partial blocks of random bits, 16 different masks."""
    heads, rows, _ = ids.shape[1:]
    some = max(1, round(share * int(counts.max())))
    place = (counts - some).clamp(min=0)[..., None] + torch.arange(some, device="cuda")
    bits = torch.rand(16, BLOCK, BLOCK, device="cuda") < 0.5
    which = torch.randint(0, 16, (1, heads, rows, some), device="cuda", dtype=torch.int32)
    partial_ids = ids.gather(-1, place.long())
    number = torch.full_like(counts, some)
    return counts - some, lists.Partial(number, partial_ids, which, lists.pack_bits(bits))


def options_cost(name: str, heads: int, n: int, d: int) -> list[Row]:
    """Each option on the lists of each density, as a factor over the same lists without it."""
    q, k, v = operands(heads, n, d)
    scale = d**-0.5
    blocks = n // BLOCK
    lengths = torch.full((blocks,), BLOCK, dtype=torch.int32, device="cuda")
    lengths[::3] = BLOCK - 28
    bias = torch.randn(1, heads, n, device="cuda")
    rows: list[Row] = []
    for density in DENSITIES:
        counts, ids = random_lists([density] * heads, n, BLOCK, BLOCK)
        measured = float(counts.float().mean()) / blocks
        means = pooling.mean_substitute(k, v, counts, ids, BLOCK)
        full, some = partly(counts, ids, 0.125)
        variants: dict[str, tuple[Any, ...]] = {
            "drop": (counts, None, None, None, None),
            "drop, with LSE": (counts, None, None, None, None),
            "block means": (counts, None, None, None, means),
            "block lengths": (counts, None, lengths, None, None),
            "key bias": (counts, None, None, bias, None),
            "1/8 partial blocks": (full, some, None, None, None),
        }
        base = math.nan
        for label, (number, *options) in variants.items():
            args = (q, k, v, number, ids, BLOCK, BLOCK, scale, *options)
            call = partial(kernel.forward, *args, return_lse=label == "drop, with LSE")
            error = gate(f"{label}, {name}, {density}", call()[0], args)
            times = time_ms(call)
            base = times["ms"] if label == "drop" else base
            rows.append(
                {"shape": name, "option": label, "density": measured, "error": error, **times}
                | {"over_drop": times["ms"] / base}
                | ({"allowed": 1.04 + 1 / (BLOCK * measured)} if label == "block means" else {})
            )
            print(line(rows[-1]), flush=True)
    for label, call in (
        ("means of K and V", lambda: [pooling.block_means(x, BLOCK) for x in (k, v)]),
        ("bits of dropped blocks", lambda: pooling.dropped_bits(counts, ids, blocks, None)),
        ("transposed lists", lambda: transpose(counts, ids, blocks)),
    ):
        rows.append({"shape": name, "option": label, "density": measured, **time_ms(call)})
        print(line(rows[-1]), flush=True)
    return rows


def dense_backward(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """cuDNN's backward alone."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(*inputs)
        grad = torch.randn_like(out)
        return time_ms(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


def gradients(name: str, heads: int, n: int, d: int) -> list[Row]:
    """Backward with its transposition, against cuDNN's dense backward."""
    q, k, v = operands(heads, n, d)
    rows = [{"shape": name, "option": "cuDNN dense backward", "density": 1.0}]
    rows[0] |= dense_backward(q, k, v)
    print(line(rows[0]), flush=True)
    for density in (1.0, 0.25, 0.1):
        counts, ids = random_lists([density] * heads, n, BLOCK, BLOCK)
        args = (q, k, v, counts, ids, BLOCK, BLOCK, d**-0.5)
        out, lse = ops_lse.call(*args)
        grad = torch.randn_like(out)
        given = (grad, torch.zeros_like(lse), q, k, v, out, lse, *args[3:])
        call = partial(backward.backward, *given)
        head = [x[:, -1:] for x in (*given[:7], counts, ids)]
        wide = [x.double() if x.is_floating_point() else x for x in head]
        truth, rounded = (reference.backward(*x, *args[5:])[:3] for x in (wide, head))
        own = max(map(relative_error, rounded, truth))
        error = max(map(relative_error, (x[:, -1:] for x in call()[:3]), truth))
        if not error <= 2 * own:
            raise SystemExit(f"gate: backward, {name}, {density}: error {error}, budget {2 * own}")
        times = time_ms(call)
        rows.append({"shape": name, "option": "backward", "density": density, "error": error})
        rows[-1] |= {**times, "efficiency": rows[0]["ms"] / times["ms"] * density}
        print(line(rows[-1]), flush=True)
    return rows


def head_sizes() -> list[Row]:
    """Kernels at density 0.25 and dense ones by head size, as factors over their own D = 128.

    For plain Triton with its share of the bound, for Gluon with the efficiency against cuDNN.
    """
    from attention_parts import run

    rows: list[Row] = []

    def add(kind: str, d: int, density: float, call: Callable[[], object]) -> Row:
        row: Row = {"shape": f"12x32768x{d}", "option": kind, "density": density, **time_ms(call)}
        whole = next((r["ms"] for r in rows if r["option"] == kind), row["ms"])
        rows.append(row | {"over_128": row["ms"] / whole})
        return rows[-1]

    for d in (128, 112, 96, 80, 72, 64, 32):
        q, k, v = operands(12, 32768, d)
        counts, ids = random_lists([0.25] * 12, 32768, BLOCK, BLOCK)
        args = (q, k, v, counts, ids, BLOCK, BLOCK, d**-0.5)
        cudnn = add(
            "head size, cuDNN dense", d, 1.0, partial(dense, SDPBackend.CUDNN_ATTENTION, q, k, v)
        )
        flash = partial(dense, SDPBackend.FLASH_ATTENTION, q, k, v)
        add("head size, FlashAttention-2 dense", d, 1.0, flash)
        for kind, forward in (("head size, Gluon", hopper.forward), ("head size", kernel.forward)):
            call = partial(forward, *args)
            error = gate(f"{kind} {d}", call()[0], (*args, None, None, None, None))
            row = add(kind, d, 0.25, call)
            row |= {"error": error, "efficiency": cudnn["ms"] / row["ms"] * 0.25}
        parts = (partial(run, q, k, v, counts, ids, BLOCK, softmax=x) for x in (True, False))
        softmax, products = (time_ms(part)["ms"] for part in parts)
        row |= {"allowed": 1.15 * math.ceil(d / 16) * 16 / 128, "softmax_ms": softmax}
        row |= {"products_ms": products, "share_of_bound": max(softmax, products) / row["ms"]}
        print("\n".join(map(line, rows[-4:])), flush=True)
    return rows


def small_blocks() -> list[Row]:
    """Lists of 16-token blocks with weights, as hierarchical selection makes them; 24 heads."""
    n, d, block, entries = 65536, 64, 16, 32
    q, k, v = operands(24, n, d)
    blocks = n // block
    counts = torch.full((1, 24, blocks), entries, dtype=torch.int32, device="cuda")
    ids = torch.randint(0, blocks // entries, (1, 24, blocks, entries), device="cuda")
    ids = (ids + torch.arange(0, blocks, blocks // entries, device="cuda")).int()
    bias = torch.zeros(1, 24, n, device="cuda")
    args = (q, k, v, counts, ids, block, block, d**-0.5, None, None, bias, None)
    call = partial(kernel.forward, *args)
    error = gate("16-token blocks", call()[0], args)
    row = {"shape": f"24x{n}x{d}", "option": "32 of 16-token blocks", "density": entries / blocks}
    row |= {"error": error, **time_ms(call)}
    print(line(row), flush=True)
    return [row]


def replaced(before: list[Row], rows: list[Row]) -> list[Row]:
    """``before`` with ``rows`` in their places, new ones at the end."""
    new = {(row["shape"], row["option"], row["density"]): row for row in rows}
    kept = [new.pop((row["shape"], row["option"], row["density"]), row) for row in before]
    return kept + list(new.values())


def line(row: Row) -> str:
    factors = "  ".join(
        f"{name} {row[name]:.3f}"
        for name in ("over_drop", "over_128", "allowed", "share_of_bound", "efficiency")
        if name in row
    )
    error = f"{row['error']:.1e}" if "error" in row else ""
    return (
        f"{row['shape']:<15}{row['option']:<24}{row['density']:<7.3f}{row['ms']:<9.4f}"
        f"{error:<9}{factors}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--date", required=True, help="of this run, written into the report")
    parts: dict[str, Callable[[], list[Row]]] = {
        "options_128": partial(options_cost, "12x32768x128", 12, 32768, 128),
        "options_64": partial(options_cost, "24x32768x64", 24, 32768, 64),
        "gradients_128": partial(gradients, "12x32768x128", 12, 32768, 128),
        "gradients_64": partial(gradients, "24x32768x64", 24, 32768, 64),
        "head_sizes": head_sizes,
        "small_blocks": small_blocks,
    }
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    options = parser.parse_args()
    import triton

    report: dict[str, Any] = {
        "date": options.date,
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "dtype": "bfloat16",
        "block": [BLOCK, BLOCK],
        "results": [],
    }
    if options.parts != list(parts) and options.output and options.output.exists():
        report = json.loads(options.output.read_text())
    for name in options.parts:
        rows = [{**row, "date": options.date} for row in parts[name]()]
        report["results"] = replaced(report["results"], rows)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
