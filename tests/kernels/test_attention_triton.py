"""The plain Triton kernels with every option, forward and backward, within derived bounds.

They run on the GPU, or in Triton's interpreter where that is installed; bfloat16 only on the GPU,
since the interpreter's is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import api, lists, ops_lse, pooling
from ditopt.kernels.block_sparse_attention.lists import Partial

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if CUDA else []),
]
Build = Callable[..., Any]
NAMES = ("q", "k", "v", "pooled_k", "pooled_v")
CASES: list[tuple[tuple[int, ...], str]] = [  # batch, heads, n_q, n_k, head size, blocks; options
    ((1, 1, 1, 1, 32, 16, 16), ""),
    ((1, 2, 63, 100, 16, 32, 64), "p"),
    ((2, 2, 40, 63, 24, 16, 16), "plb"),
    ((1, 2, 100, 90, 72, 64, 32), "plbw"),
    ((1, 1, 70, 90, 80, 32, 32), "m"),
    ((1, 2, 33, 130, 96, 16, 64), "plm"),
    ((1, 1, 20, 40, 112, 16, 32), "lw"),
    ((1, 1, 20, 512, 24, 16, 16), "m"),  # as many means as fill a tile
]
LARGE: list[tuple[tuple[int, ...], str]] = [
    ((2, 2, 1000, 777, 128, 128, 128), "plbw"),
    ((1, 2, 1000, 1000, 128, 128, 64), "m"),
    ((1, 3, 777, 1000, 64, 64, 128), "plm"),
    ((1, 2, 500, 300, 96, 128, 128), "plbw"),
    ((1, 2, 500, 300, 72, 128, 128), "plbw"),
    ((1, 2, 500, 300, 80, 128, 128), "m"),
    ((1, 2, 500, 300, 112, 64, 64), "plm"),
    ((1, 2, 500, 300, 64, 16, 16), "bw"),
    ((1, 2, 500, 300, 32, 256, 32), "plm"),
    ((1, 2, 200, 8192, 64, 128, 64), "m"),
    ((1, 1, 200, 16384, 128, 128, 128), "m"),
]
RUNS = [(*case, dtype) for dtype in (torch.float32, torch.float16) for case in CASES]
if CUDA:  # every program takes seconds to compile
    RUNS = [(*case, torch.float32) for case in CASES[::2]] + [(*LARGE[0], torch.float16)]
    RUNS += [(*case, torch.bfloat16) for case in LARGE]


def config_of(case: Any) -> Any:
    """Tiles for the interpreter, which knows no GPU: halves of blocks, or several of them."""
    from ditopt.kernels.block_sparse_attention.configs import PlainConfig

    return None if CUDA else PlainConfig(max(16, case.block_q // 2), 32, 4, 2)


@pytest.mark.parametrize(("shape", "options", "dtype"), RUNS)
def test_forward(
    shape: tuple[int, ...], options: str, dtype: torch.dtype, build_case: Build
) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    case = build_case(shape, options, dtype)
    truth, true_lse = case.truth()
    out, lse = triton.forward(*case.to(DEVICE).args, return_lse=True, config=config_of(case))
    assert truth.holds(out)
    assert true_lse.holds(lse)


@pytest.mark.parametrize(("shape", "options", "dtype"), RUNS)
def test_backward(
    shape: tuple[int, ...], options: str, dtype: torch.dtype, build_case: Build
) -> None:
    from ditopt.kernels.block_sparse_attention import triton_backward

    case = build_case(shape, options, dtype)
    truth, true_lse = case.truth()
    grad_out = torch.randn(truth.value.shape, dtype=torch.float64).to(dtype)
    grad_lse = torch.where(true_lse.value.isinf(), 0.0, torch.randn(true_lse.value.shape))
    results = (truth.value.to(dtype), true_lse.value.float())
    here = case.to(DEVICE)
    given = [x.to(DEVICE) for x in (grad_out, grad_lse, *here.args[:3], *results)]
    grads = triton_backward.backward(*given, *here.args[3:])
    expected = case.gradients(grad_out, grad_lse)
    for name, ours, true in zip(NAMES, grads, expected, strict=False):
        assert true.holds(ours), name


@pytest.mark.parametrize("n_k", [96, 90, 20])  # whole blocks, a ragged last one, none that is whole
@pytest.mark.parametrize("wrong", [-1, -(1 << 20), 3, 1 << 20])
def test_wrong_ids_read_nothing_outside(n_k: int, wrong: int, build_case: Build) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    case = build_case((1, 2, 40, n_k, 32, 32, 32), "", torch.float32).to(DEVICE)
    q, k, v, counts, ids, *rest = case.args
    around = [torch.full((1, 2, n_k + 256, 32), math.nan, device=DEVICE) for _ in "kv"]
    for outer, inner in zip(around, (k, v), strict=True):
        outer[:, :, 128:-128] = inner
    k, v = (x[:, :, 128:-128] for x in around)
    counts = torch.full_like(counts, 99)  # beyond the lists, too
    ids = ids.clone()
    ids[..., :-1:2] = wrong
    ids[..., -1] = 0
    out = triton.forward(q, k, v, counts, ids, *rest, config=config_of(case))[0]
    assert out.isfinite().all()


def test_lists_broadcast_over_batch_and_heads(build_case: Build) -> None:
    from ditopt.kernels.block_sparse_attention import triton, triton_backward

    shape = (2, 2, 30, 40, 16, 16, 16)
    one = build_case(shape, "plb", torch.float32, list_batch=1, list_heads=1)
    many = build_case(shape, "plb", torch.float32, list_batch=1, list_heads=1)
    wide = [x.expand(2, 2, *x.shape[2:]).contiguous() for x in (many.counts, many.ids)]
    partial = many.partial
    many.counts, many.ids = wide
    many.partial = Partial(
        *(x.expand(2, 2, *x.shape[2:]).contiguous() for x in partial[:3]), partial.masks
    )
    config = config_of(one)
    results = [
        triton.forward(*case.to(DEVICE).args, return_lse=True, config=config)
        for case in (one, many)
    ]
    assert torch.equal(results[0][0], results[1][0])
    out, lse = results[0]
    grad_out, grad_lse = torch.ones_like(out), torch.zeros_like(lse)
    grads = [
        triton_backward.backward(
            grad_out, grad_lse, *case.to(DEVICE).args[:3], out, lse, *case.to(DEVICE).args[3:]
        )
        for case in (one, many)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("wrong", [-1, -(1 << 20), 99, 1 << 27])
def test_wrong_ids_and_counts_read_nothing_outside(wrong: int, build_case: Build) -> None:
    from ditopt.kernels.block_sparse_attention import triton, triton_backward

    case = build_case((1, 1, 20, 40, 16, 16, 16), "plb", torch.float32)
    case.counts = torch.full_like(case.counts, 1 << 20)
    case.ids = torch.full_like(case.ids, wrong)
    fields = (torch.full_like(x, wrong) for x in case.partial[:3])
    case.partial = Partial(*fields, case.partial.masks)
    case = case.to(DEVICE)
    out, lse = triton.forward(*case.args, return_lse=True, config=config_of(case))
    assert not out.any()  # no such block exists
    assert bool((lse == -math.inf).all())
    given = (torch.ones_like(out), torch.zeros_like(lse), *case.args[:3], out, lse)
    grads = triton_backward.backward(*given, *case.args[3:])
    assert not any(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("n", [1, 63, 100])
def test_means(n: int) -> None:
    from ditopt.kernels.block_sparse_attention import triton_means

    torch.manual_seed(0)
    x = torch.randn(2, n, 3, 40, device=DEVICE).transpose(1, 2)
    lengths = torch.randint(-1, 17, (-(-n // 16),), dtype=torch.int32, device=DEVICE)
    for given in (None, lengths.clamp(min=0)):
        ours = triton_means.block_means(x, 16, given)
        truth = pooling.block_means(x.double(), 16, given)
        size = pooling.block_means(x.double().abs(), 16, given)
        assert bool(((ours - truth).abs() <= 17 * torch.finfo(torch.float32).eps * size).all())


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 5), (150, 9)])
def test_transposed_lists(rows: int, width: int) -> None:
    from ditopt.kernels.block_sparse_attention import triton_lists

    torch.manual_seed(0)
    counts, ids = lists.from_blocks(torch.rand(2, 1, rows, width) < 0.4)
    ids = torch.where(torch.rand(ids.shape) < 0.1, width + 3, ids)  # and some that do not exist
    expected = lists.transpose(counts, ids, width)
    ours = triton_lists.transpose(counts.to(DEVICE), ids.to(DEVICE), width)
    assert torch.equal(ours.starts.cpu(), expected.starts)
    for b in range(2):
        used = int(expected.starts[b, 0, -1])
        assert torch.equal(ours.entries[b, 0, :used].cpu(), expected.entries[b, 0, :used])


needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("options", ["", "plbw"])
def test_operator_on_cuda_passes_opcheck(options: str, build_case: Build) -> None:
    case = build_case((1, 2, 100, 90, 64, 64, 64), options, torch.float32).to("cuda")
    args = case.args
    for x in args[:3]:
        x.requires_grad_()
    flat = (*args[:8], *ops_lse.flatten(*args[8:]))
    torch.library.opcheck(torch.ops.ditopt.block_sparse_attention_with_lse.default, flat)
    means = (args[1], 64, None)
    torch.library.opcheck(torch.ops.ditopt.block_means.default, means)


@needs_cuda
def test_one_graph_and_cuda_graphs(build_case: Build) -> None:
    case = build_case((1, 2, 500, 500, 64, 128, 128), "", torch.bfloat16).to("cuda")

    def step(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        kwargs: dict[str, Any] = {"block_q": 128, "block_k": 128, "dropped": "mean"}
        return api.block_sparse_attention(q, k, v, counts, ids, **kwargs) * 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)(*case.args[:5])
    expected = step(*case.args[:5])
    assert torch.equal(compiled, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*case.args[:5])
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, expected)


@needs_cuda
def test_gradients_repeat_bit_by_bit(build_case: Build) -> None:
    case = build_case((1, 2, 1000, 1000, 64, 64, 64), "pl", torch.bfloat16).to("cuda")
    q, k, v = (x.requires_grad_() for x in case.args[:3])
    first, second = (
        torch.autograd.grad(ops_lse.call(q, k, v, *case.args[3:])[0].square().sum(), (q, k, v))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_cuda
def test_the_extended_operator_is_embedded_by_inductor(build_case: Build) -> None:
    from torch._inductor.utils import run_and_get_code

    from ditopt.kernels.block_sparse_attention import triton

    case = build_case((1, 2, 500, 300, 96, 128, 128), "plbw", torch.bfloat16).to("cuda")
    flat = (*case.args[:8], *ops_lse.flatten(*case.args[8:]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: triton.plain_with_lse(*a)[0] * 1, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, *flat)
    assert torch.equal(out, triton.plain_with_lse(*flat)[0])
    assert "_forward" in code
    assert "torch.ops.ditopt" not in code
