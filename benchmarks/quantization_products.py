"""Matrix products in 8 bits and what rounds their inputs: a part of benchmarks/quantization.py."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from models import kernels_of, relative_l2

from ditopt.kernels.quantize_rows import ops  # noqa: F401  (registers the operator)
from ditopt.quantization import LinearRule, rowwise
from ditopt.quantization.layer import compute, derive
from ditopt.timing import timed

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

ANCHORS = (
    (32768, 1536, 1536),
    (32768, 1536, 8960),
    (32768, 8960, 1536),
    (4608, 3072, 12288),
    (118784, 3072, 12288),
)
MERGED = ((8192, 1152, 3456), (4608, 3072, 21504), (32760, 1536, 4608))
PRODUCERS = (
    (8192, 1152, "norm"),
    (32760, 1536, "norm"),
    (4608, 3072, "norm"),
    (8192, 4608, "gelu"),
    (32760, 8960, "gelu"),
    (4608, 12288, "gelu"),
    (4608, 15360, "none"),
)


def rule(**fields: Any) -> LinearRule:
    return LinearRule.model_validate({"simulate": not CUDA, **fields})


def milliseconds(run: Any) -> float:
    """Median device time of one call."""
    if not CUDA:
        return statistics.median(timed(run)[1] for _ in range(3))
    from triton.testing import do_bench

    return float(do_bench(run, warmup=15, rep=60, return_mode="median"))


def gemm(m: int, k: int, n: int, *, whole: bool, int8: bool) -> dict[str, Any]:
    """One product in bf16, in fp8 alone, and from bf16 input to bf16 output."""
    x, w, b = (torch.randn(*s, device=DEVICE, dtype=BF16) for s in ((m, k), (n, k), (n,)))
    w *= k**-0.5
    row: dict[str, Any] = {
        "m": m,
        "k": k,
        "n": n,
        "bf16_ms": milliseconds(lambda: F.linear(x, w, b)),
    }
    fp8 = rule(format="fp8_row")
    made = derive(fp8, [w], [], {})
    sizes = {"n": n, "k": k, "dtype": BF16}
    if whole:
        torch._dynamo.reset()
        run = torch.compile(lambda x: compute(fp8, x, made, b, **sizes, native=CUDA), dynamic=False)
        y = run(x)
        row["fp8_with_quantization_ms"] = milliseconds(lambda: run(x))
        row["speedup_with_quantization"] = row["bf16_ms"] / row["fp8_with_quantization_ms"]
        some = x[:256].double()
        row["fp8_error"] = relative_l2(y[:256].double(), some @ w.double().T + b.double())
    if CUDA:
        q, s = rowwise.quantize_rows(x, 448.0, FP8)
        for name, fast in (("fp8_ms", True), ("fp8_exact_accumulation_ms", False)):
            arguments = (q, made["weight"].t(), s, made["scale"], b, None, BF16, fast)
            row[name] = milliseconds(lambda a=arguments: torch._scaled_mm(*a))
        exact, fast = (
            torch._scaled_mm(q[:256], made["weight"].t(), s[:256], made["scale"], b, None, BF16, f)
            for f in (False, True)
        )
        row["fast_accumulation_error"] = relative_l2(fast, exact)
    if int8:
        eight = rule(format="int8_row")
        kept = derive(eight, [w], [], {})
        numbers, _ = rowwise.quantize_rows(x, 127.0, torch.int8)
        row["int8_ms"] = milliseconds(lambda: torch._int_mm(numbers, kept["weight"].t()))
        all_of_it = torch.compile(
            lambda x: compute(eight, x, kept, b, **sizes, native=True), dynamic=False
        )
        all_of_it(x)
        row["int8_with_quantization_ms"] = milliseconds(lambda: all_of_it(x))
    return row


def producer(m: int, k: int, kind: str) -> dict[str, Any]:
    """What comes before a layer, with and without rounding in the same kernel."""
    x = torch.randn(1, m, k, device=DEVICE, dtype=BF16)
    scale, shift = (torch.randn(1, 1, k, device=DEVICE, dtype=BF16) for _ in range(2))
    before = {
        "norm": lambda x: F.layer_norm(x, (k,)) * (1 + scale) + shift,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "none": lambda x: x * 1.0,
    }[kind]
    torch._dynamo.reset()
    alone = torch.compile(before, dynamic=False)
    rounded = torch.compile(
        lambda x: rowwise.quantize_rows(before(x).reshape(-1, k), 448.0, FP8), dynamic=False
    )
    alone(x), rounded(x)
    row = {
        "rows": m,
        "k": k,
        "kind": kind,
        "bf16_ms": milliseconds(lambda: alone(x)),
        "fp8_ms": milliseconds(lambda: rounded(x)),
    }
    if CUDA:
        row["kernels"] = kernels_of(lambda: rounded(x))["count"]
        torch._dynamo.reset()
        best = torch.compile(
            lambda x: rowwise.quantize_rows(before(x).reshape(-1, k), 448.0, FP8),
            dynamic=False,
            options={"triton.multi_kernel": 1},
        )
        best(x)
        row["fp8_best_of_loop_and_register_ms"] = milliseconds(lambda: best(x))
        if kind != "norm":
            parts, names = [x.view(m, k)], ["gelu_tanh" if kind == "gelu" else "none"]
            row["fp8_own_kernel_ms"] = milliseconds(
                lambda: torch.ops.ditopt.quantize_rows(parts, names, FP8)
            )
    return row
