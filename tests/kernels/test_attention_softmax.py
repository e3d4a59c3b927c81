"""The plain Triton kernel's softmax: lazy rescaling, means before the list, strides.

As in test_attention_triton: on the GPU, or in Triton's interpreter, where products with 1 stand for
the assembly that jumps over them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from ditopt.kernels.block_sparse_attention.configs import PlainConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    *([pytest.mark.gpu] if CUDA else []),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
Build = Callable[..., Any]
LAZY = PlainConfig(32, 32, 2, 2, lazy=True)


def grow(case: Any, steps: float) -> Any:
    """Scores of the keys, and of the means, rise or fall by ``steps`` powers of two over the list.

    Every query has a channel of its own for it, beside noise.
    """
    case.q[..., 0] = 1
    slope = steps * math.log(2) / abs(case.scale)
    for keys in [case.k] if case.pooled is None else [case.k, case.pooled.k]:
        keys[..., 0] = torch.linspace(0, slope, keys.shape[2])
    return case


@pytest.mark.parametrize("steps", [-60, 20, 400])
@pytest.mark.parametrize("options", ["", "p", "m", "plbw"])
def test_lazy_rescaling_follows_maxima(options: str, steps: float, build_case: Build) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    # Float16 ends at 2^16: a reference point that stayed behind by more would make infinities.
    dtype = torch.float32 if abs(steps) > 60 else torch.float16
    case = grow(build_case((1, 2, 40, 230, 80, 32, 64), options, dtype), steps)
    truth, true_lse = case.truth()
    out, lse = triton.forward(*case.to(DEVICE).args, return_lse=True, config=LAZY)
    assert truth.holds(out)
    assert true_lse.holds(lse)


@needs_cuda
@pytest.mark.parametrize("steps", [-60, 20, 60, 200])
@pytest.mark.parametrize("d", [72, 80, 96])
@pytest.mark.parametrize("n", [1024, 777])
def test_default_lazy_entries_follow_maxima(
    n: int, d: int, steps: float, build_case: Build
) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    case = grow(build_case((1, 2, n, n, d, 128, 128), "", torch.bfloat16), steps)
    truth, true_lse = case.truth()
    case = case.to("cuda")
    assert triton.default_config(case.q, 128, 128, True).lazy
    out, lse = triton.forward(*case.args, return_lse=True)
    assert truth.holds(out)
    assert true_lse.holds(lse)


@needs_cuda
@pytest.mark.parametrize("d", [72, 80, 96])
@pytest.mark.parametrize("n", [1024, 777])
def test_two_programs_of_lazy_entries_fit(n: int, d: int, build_case: Build) -> None:
    """Above 128 registers a thread half as many fit a multiprocessor, and nothing else says so."""
    from ditopt.kernels.block_sparse_attention import triton

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the configurations of other devices are not tuned")
    compiled: list[Any] = []

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **kwargs: compiled.append(triton._forward[grid](**kwargs))

    case = build_case((1, 2, n, n, d, 128, 128), "", torch.bfloat16).to("cuda")
    triton.forward(*case.args, launcher=Launcher())
    assert compiled[0].n_regs <= 128
    assert compiled[0].n_spills == 0


def test_float32_and_options_are_not_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    q = torch.zeros(1, 1, 128, 96, dtype=torch.bfloat16)
    assert triton.default_config(q, 128, 128, True).lazy
    assert not triton.default_config(q, 128, 128, False).lazy
    assert not triton.default_config(q.float(), 128, 128, True).lazy
    assert not triton.default_config(q[..., :64], 128, 128, True).lazy


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("hidden", ["none", "all", "first tile"])
@pytest.mark.parametrize("n_k", [20, 512, 523])  # 2, 32 and 33 means in tiles of 32
def test_rows_that_see_no_means(n_k: int, hidden: str, lazy: bool, build_case: Build) -> None:
    """Also rows whose lists are empty, with and without means, and options behind the means."""
    from ditopt.kernels.block_sparse_attention import triton

    case = build_case((1, 2, 40, n_k, 24, 16, 16), "mp", torch.float32)
    bits = case.pooled.bits.clone()
    means = case.pooled.k.shape[2]
    first = {"none": 0, "all": means, "first tile": 32}[hidden]
    bits[..., : -(-first // 32)] = 0
    case.pooled = case.pooled._replace(bits=bits)
    case.mask = case.mask.clone()
    case.mask[..., n_k : n_k + first] = False
    truth, true_lse = case.truth()
    assert bool(true_lse.value.isinf().any()) == (first >= means)
    config = PlainConfig(16, 32, 1, 2, lazy=lazy)
    out, lse = triton.forward(*case.to(DEVICE).args, return_lse=True, config=config)
    assert truth.holds(out)
    assert true_lse.holds(lse)


@pytest.mark.parametrize("n_k", [96, 90])
@pytest.mark.parametrize("apart", ["k", "v", "pooled"])
def test_keys_and_values_of_different_strides(apart: str, n_k: int, build_case: Build) -> None:
    from ditopt.kernels.block_sparse_attention import triton

    case = build_case((2, 2, 40, n_k, 40, 32, 32), "m", torch.float32).to(DEVICE)
    if apart == "pooled":
        values = case.pooled.v.transpose(1, 2).contiguous().transpose(1, 2)
        case.pooled = case.pooled._replace(k=case.pooled.k.contiguous(), v=values)
        assert case.pooled.k.stride(2) != case.pooled.v.stride(2)
    else:
        setattr(case, apart, getattr(case, apart).contiguous())
        assert case.k.stride(2) != case.v.stride(2)
    out, lse = triton.forward(*case.args, return_lse=True, config=PlainConfig(32, 32, 2, 2))
    truth, true_lse = case.to("cpu").truth()
    assert truth.holds(out)
    assert true_lse.holds(lse)
