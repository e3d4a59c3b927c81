"""Attention on one GPU: ours, cuDNN, FlashAttention-2, compiled FlexAttention on equal lists.

    python benchmarks/attention.py --output benchmarks/results/attention_h200.json

A time is printed only after the correctness gate of the same run: every implementation, on every
case, must be within twice the error that the bf16 reference itself has against fp64 (one head).
Density is measured from the lists. Efficiency is (cuDNN dense time / time) x density: 1.00 is a
kernel that is as fast as cuDNN on the pairs it keeps. Medians and 20th to 80th percentiles of CUDA
events.
"""

from __future__ import annotations

import argparse
import json
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

from ditopt.kernels.block_sparse_attention import flex, ops, reference

Lists = tuple[Tensor, Tensor]
MIXED = [0.05, 0.05, 0.1, 0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0]
DATE = "2026-11-20"


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


def candidates(block_q: int, block_k: int, scale: float) -> dict[str, Callable[..., Tensor]]:
    """Implementations with the operator's signature."""
    from ditopt.kernels.block_sparse_attention import triton as kernel

    found: dict[str, Callable[..., Tensor]] = {"ours": ops.call, "ours, plain Triton": kernel.plain}
    found["FlexAttention, compiled"] = compiled_flex(block_q, block_k, scale)
    return found


def run_case(
    name: str, heads: int, n: int, d: int, cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """All implementations on all lists of one shape; stops the program when the gate is red."""
    torch.manual_seed(0)
    shape = (1, n, heads, d)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    )
    baseline = time_ms(partial(dense, SDPBackend.CUDNN_ATTENTION, q, k, v))
    flash = time_ms(partial(dense, SDPBackend.FLASH_ATTENTION, q, k, v))
    flops = 4.0 * heads * n * n * d
    results = [
        {"shape": name, "implementation": label, "density": 1.0, **times}
        | {"tflops": flops / times["ms"] / 1e9}
        for label, times in (("cuDNN dense", baseline), ("FlashAttention-2 dense", flash))
    ]
    print(*map(row, results), sep="\n", flush=True)
    implementations: dict[tuple[int, int], dict[str, Callable[..., Tensor]]] = {}
    for case in cases:
        block_q, block_k = case["block"]
        counts, ids = random_lists(case["densities"](heads), n, block_q, block_k)
        density = float(counts.float().mean()) / ids.shape[-1]
        rest = (block_q, block_k, d**-0.5)
        if rest[:2] not in implementations:
            implementations[rest[:2]] = candidates(*rest)
        head = (q[:, -1:], k[:, -1:], v[:, -1:], counts[:, -1:], ids[:, -1:])
        truth = reference.block_sparse_attention(*(x.double() for x in head[:3]), *head[3:], *rest)
        own = relative_error(reference.block_sparse_attention(*head, *rest), truth)
        for label, call in implementations[rest[:2]].items():
            args = (q, k, v, counts, ids, *rest)
            error = relative_error(call(*args)[:, -1:], truth)
            if not error <= 2 * own:
                raise SystemExit(f"gate: {label}, {name}, {case}: error {error}, budget {2 * own}")
            times = time_ms(partial(call, *args))
            results.append(
                {"shape": name, "implementation": label, "block": [block_q, block_k]}
                | {"lists": case["name"], "density": density, "error": error, **times}
                | {"speedup_over_cudnn": baseline["ms"] / times["ms"]}
                | {"speedup_over_fa2": flash["ms"] / times["ms"]}
                | {"efficiency": baseline["ms"] / times["ms"] * density}
            )
            print(row(results[-1]), flush=True)
    return results


def row(result: dict[str, Any]) -> str:
    return (
        f"{result['shape']:<16}{result['implementation']:<26}{result.get('block', '')!s:<12}"
        f"{result.get('lists', ''):<8}{result['density']:<8.3f}{result['ms']:<10.3f}"
        f"{result.get('efficiency', float('nan')):<8.3f}{result.get('error', float('nan')):.2e}"
    )


def uniform(density: float, block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    return {"name": "equal", "block": block, "densities": lambda heads: [density] * heads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape, two densities")
    options = parser.parse_args()
    sparse = [uniform(d) for d in (0.5, 0.25, 0.1, 0.05)]
    mixed = {"name": "mixed", "block": (128, 128), "densities": lambda heads: MIXED * (heads // 12)}
    other = [uniform(0.25, (128, 64)), uniform(0.25, (64, 64))]
    shapes: list[tuple[str, int, int, int, list[dict[str, Any]]]] = [
        ("Wan 32768x128", 12, 32768, 128, [uniform(1.0), *sparse, mixed, *other]),
        ("24x32768x64", 24, 32768, 64, [*sparse, mixed, *other]),
        ("24x118784x128", 24, 118784, 128, [uniform(0.25), uniform(0.05)]),
    ]
    if options.quick:
        shapes = [("Wan 32768x128", 12, 32768, 128, [sparse[1], sparse[3]])]
    import triton

    report: dict[str, Any] = {
        "date": DATE,
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "dtype": "bfloat16",
        "layout": "q, k, v are [B, H, N, D] views of [B, N, H, D]",
        "results": [],
    }
    for name, heads, n, d, cases in shapes:
        report["results"] += run_case(name, heads, n, d, cases)
        torch._dynamo.reset()
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
