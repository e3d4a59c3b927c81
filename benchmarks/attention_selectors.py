"""Selectors, token orders and hierarchical attention on one GPU, against dense attention.

    python benchmarks/attention_selectors.py --output benchmarks/results/selectors_h200.json

A time is printed only after the gate of the same run: lists are valid and equal the reference's in
float64 up to blocks whose scores lie within rounding; masses sum to the queries; an order and back
is the identity; hierarchical attention is within twice the error that its bf16 reference has
against fp64 (whole at 4,196 tokens, sampled query blocks at 65,536). Times are medians and 20th to
80th percentiles of CUDA events; `graph_ms` is the same call replayed from a CUDA graph, without the
host. Densities are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench, do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ditopt.kernels.block_selection import reference as selection
from ditopt.kernels.block_selection.api import select_blocks
from ditopt.kernels.block_sparse_attention.api import validate_lists
from ditopt.kernels.block_sparse_attention.lists import to_blocks
from ditopt.kernels.hierarchical_attention import reference as hierarchy
from ditopt.kernels.hierarchical_attention.api import hierarchical_attention
from ditopt.layout import TokenLayout
from ditopt.token_order import Tile, inverse, sequence_permutation

DATE = "2026-11-21"
BLOCK = 128
RULES = (("top_k", 0.25), ("top_p", 0.9), ("threshold", 1.0))
SHAPES = ((32768, 12, 128), (118784, 24, 128))  # tokens, heads, head size
HEADS, SIZE, TOP_K = 8, 64, 8  # hierarchical attention, batch 1
LENGTHS = (1 << 14, 1 << 16, 1 << 18, 1 << 20)


def times(run: Callable[[], object], *, graph: bool = True) -> dict[str, float]:
    low, median, high = do_bench(run, warmup=25, rep=100, quantiles=[0.2, 0.5, 0.8])
    found = {"ms": median, "ms_p20": low, "ms_p80": high}
    if graph:
        found["graph_ms"] = do_bench_cudagraph(run, rep=20, return_mode="median")
    return {name: round(value, 5) for name, value in found.items()}


def tensors(n: int, heads: int, d: int) -> list[Tensor]:
    """q, k, v [1, H, N, D] in bf16 as views of [1, N, H, D]; neighbours are alike, as in a DiT."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, n, heads, d)
    made = []
    for _ in range(3):
        slow = torch.randn(1, -(-n // 64), heads, d, generator=generator, device="cuda")
        slow = slow.repeat_interleave(64, 1)[:, :n]
        fast = torch.randn(shape, generator=generator, device="cuda")
        made.append((0.8 * slow + fast).bfloat16().transpose(1, 2))
    return made


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def check(condition: object, what: str) -> None:
    if not condition:
        raise SystemExit(f"gate: {what}")


def gate_lists(lists: tuple[Tensor, Tensor], q: Tensor, k: Tensor, rule: str, amount: float) -> str:
    """Blocks on which the kernel and the float64 reference differ lie at the edge of the choice."""
    n = q.shape[2]
    validate_lists(*lists, n, n, BLOCK, BLOCK)
    q, k = q[:, :1].double(), k[:, :1].double()
    scores = selection.score_means(
        selection.pool(q, BLOCK), selection.pool(k, BLOCK), q.shape[3] ** -0.5
    )
    blocks = scores.shape[-1]
    lengths = selection.block_lengths(n, BLOCK, q.device)
    forced = torch.eye(blocks, dtype=torch.bool, device="cuda")
    wanted = selection.choose(scores, lengths, forced, rule, amount, 1)
    got = to_blocks(lists[0][:, :1], lists[1][:, :1], blocks)
    differ = (wanted != got).sum().item()
    check(differ <= 1e-3 * wanted.sum().item(), f"{rule}: {differ} blocks differ")
    return f"{differ} of {int(wanted.sum())} blocks differ"


def pooled_rows(n: int, heads: int, d: int, rows: list[dict[str, Any]]) -> None:
    q, k, v = tensors(n, heads, d)
    case = {"tokens": n, "heads": heads, "head_dim": d, "block": BLOCK, "dtype": "bfloat16"}
    base = times(lambda: dense(SDPBackend.CUDNN_ATTENTION, q, k, v), graph=False)
    rows.append({"what": "cuDNN dense", **case, **base})
    forced = torch.eye(-(-n // BLOCK), dtype=torch.bool, device="cuda")

    def select(rule: str, amount: float, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return select_blocks(
            q, k, block_q=BLOCK, block_k=BLOCK, rule=rule, amount=amount, forced=forced, lse=lse
        )  # type: ignore[arg-type]

    def add(what: str, run: Callable[[], object], **more: Any) -> None:
        found = times(run)
        share = {"of_dense": round(found["ms"] / base["ms"], 5)}
        share["graph_of_dense"] = round(found["graph_ms"] / base["ms"], 5)
        rows.append({"what": what, **case, **more, **found, **share})

    for rule, amount in RULES:
        lists = select(rule, amount)
        note = gate_lists(lists, q, k, rule, amount)
        density = float(lists[0].float().mean()) / lists[1].shape[-1]
        add(
            f"pooled {rule}", lambda r=rule, a=amount: select(r, a), amount=amount,
            density=round(density, 4), gate=note,
        )  # fmt: skip
    lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[1]
    lse = lse.reshape(1, heads, n)
    mass = torch.ops.ditopt.block_mass.default(q, k, lse, BLOCK, BLOCK, d**-0.5)
    off = float((mass.sum(-1) - BLOCK).abs().max())
    check(off < 0.5, f"a row of masses is off by {off}")
    add(
        "exact mass", lambda: select("top_k", 0.25, lse), amount=0.25, gate=f"rows off by {off:.3f}"
    )
    add("exact mass, kernel alone",
        lambda: torch.ops.ditopt.block_mass.default(q, k, lse, BLOCK, BLOCK, d**-0.5))  # fmt: skip

    frames = n // 1024
    layout = TokenLayout(frames, 32, 32)
    order = sequence_permutation(Tile(frames=4, rows=8, cols=4), layout)
    there, back = (torch.from_numpy(x).cuda() for x in (order, inverse(order)))
    check(torch.equal(q[:, :, there][:, :, back], q), "an order and back is not the identity")

    def around() -> None:
        for x in (q, k, v):
            torch.index_select(x, 2, there)
        torch.index_select(q, 2, back)

    add("order around one attention (q, k, v in, output back)", around)
    hidden = q.transpose(1, 2).flatten(2)
    table = torch.randn(1, 1, n, d, device="cuda")

    def once() -> None:
        torch.index_select(hidden, 1, there)
        torch.index_select(table, 2, there)
        torch.index_select(hidden, 1, back)

    add("order around the block stack (hidden and RoPE table in, hidden back)", once)


def gate_hierarchy() -> None:
    """Against the whole reference at 4,196 tokens."""
    q, k, v = tensors(4196, 2, SIZE)
    for depth in (1, 2):
        arguments = (16, TOP_K, depth, True, SIZE**-0.5)
        truth = hierarchy.attention(q.double(), k.double(), v.double(), *arguments)
        own = hierarchy.attention(q, k, v, *arguments)
        out = hierarchical_attention(q, k, v, top_k=TOP_K, depth=depth)
        mine, theirs = (float((x.double() - truth).norm() / truth.norm()) for x in (out, own))
        check(mine <= 2 * max(theirs, 2**-8), f"depth {depth}: {mine:.2e}, reference {theirs:.2e}")
        print(f"gate: depth {depth}: error {mine:.2e}, bf16 reference {theirs:.2e}")


def gate_blocks(out: Tensor, q: Tensor, k: Tensor, v: Tensor, depth: int) -> float:
    """Sampled query blocks of the first head in fp64, over the blocks that the kernels kept."""
    from ditopt.kernels.hierarchical_attention import triton

    n = q.shape[2]
    levels = [triton.pool_levels(x[:, :1], depth) for x in (q, k, v)]
    kept = triton.select(levels[0], levels[1], TOP_K, SIZE**-0.5)
    q, k, v = (x[0, 0].double() for x in (q, k, v))
    worst = 0.0
    for block in torch.randint(0, n // 16, (16,), generator=torch.Generator().manual_seed(0)):
        inside = torch.arange(16, device="cuda")
        keys = (kept[0][0, 0, block, :, None] * 16 + inside).flatten()
        columns, values, bias = [k[keys]], [v[keys]], [torch.zeros(len(keys), device="cuda")]
        for level in range(1, depth + 1):
            pooled_k, pooled_v = (levels[x][level - 1][0, 0].double() for x in (1, 2))
            if level < depth:
                above = int(block) // 16**level
                seen = (kept[level][0, 0, above, :, None] * 16 + inside).flatten()
                pooled_k, pooled_v = pooled_k[seen], pooled_v[seen]
            columns.append(pooled_k)
            values.append(pooled_v)
            bias.append(torch.full((len(pooled_k),), level * math.log(16), device="cuda"))
        rows = slice(int(block) * 16, int(block) * 16 + 16)
        scores = q[rows] @ torch.cat(columns).T * SIZE**-0.5 + torch.cat(bias)
        truth = scores.softmax(-1) @ torch.cat(values)
        worst = max(worst, float((out[0, 0, rows].double() - truth).norm() / truth.norm()))
    check(worst < 2**-6, f"sampled blocks of {n} tokens are off by {worst:.2e}")
    return worst


def hierarchical_rows(n: int, rows: list[dict[str, Any]]) -> None:
    q, k, v = tensors(n, HEADS, SIZE)
    depth = hierarchy.levels(n)
    case = {"tokens": n, "batch": 1, "heads": HEADS, "head_dim": SIZE, "block": 16,
            "top_k": TOP_K, "levels": depth, "dtype": "bfloat16"}  # fmt: skip
    baseline = None
    if n <= 1 << 16:
        found = times(lambda: dense(SDPBackend.FLASH_ATTENTION, q, k, v), graph=False)
        rows.append({"what": "FlashAttention-2 dense", **case, **found})
        baseline = found["ms"]
        found = times(lambda: dense(SDPBackend.CUDNN_ATTENTION, q, k, v), graph=False)
        rows.append({"what": "cuDNN dense", **case, **found})

    def run(coarse: bool) -> Tensor:
        return hierarchical_attention(q, k, v, top_k=TOP_K, coarse=coarse)

    for coarse in (True, False):
        what = "hierarchical, with pooled tokens" if coarse else "hierarchical, blocks only"
        error = {"error": round(gate_blocks(run(coarse), q, k, v, depth), 6)} if coarse else {}
        found = times(lambda c=coarse: run(c))
        row = {"what": what, **case, **found, **error}
        row["density"] = round(hierarchy.kept_fraction(n, 16, TOP_K, depth, coarse), 6)
        for name in ("ms", "graph_ms"):
            row[f"{name}_ns_per_n_log2_n"] = round(1e6 * found[name] / (n * math.log2(n)), 5)
            if baseline is not None:
                row[f"{name}_speedup_over_fa2"] = round(baseline / found[name], 2)
        rows.append(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    rows: list[dict[str, Any]] = []
    output = parser.parse_args().output
    gate_hierarchy()
    for n in LENGTHS:
        hierarchical_rows(n, rows)
    for shape in SHAPES:
        pooled_rows(*shape, rows)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "date": DATE,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cudnn": torch.backends.cudnn.version(),
        "rows": rows,
    }
    for row in rows:
        print({name: value for name, value in row.items() if name not in ("dtype", "block")})
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
