"""Rounding of rows against the arithmetic of `quantization.rowwise`, on a GPU or interpreted."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditopt.kernels.quantize_rows import ops, reference
from ditopt.quantization.rowwise import quantize_rows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
DTYPES = pytest.mark.parametrize("dtype", LARGEST, ids=["int8", "fp8"])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@DTYPES
def test_the_specification_is_the_arithmetic_of_the_formats(dtype: torch.dtype) -> None:
    a, b = rand(5, 24), rand(5, 40, seed=1)
    numbers, scale = reference.quantize_rows([a, b], ["none", "gelu_tanh"], dtype)
    x = torch.cat([a, F.gelu(b, approximate="tanh")], 1)
    wanted, wanted_scale = quantize_rows(x, LARGEST[dtype], dtype)
    assert torch.equal(numbers.float(), wanted.float())
    assert torch.equal(scale, wanted_scale)


def kernel(
    parts: list[Tensor], activations: list[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The kernel; interpreted, the last cast is torch's: the interpreter's own rounds wrongly."""
    from ditopt.kernels.quantize_rows import triton

    if CUDA or dtype == torch.int8:
        return triton.quantize_rows(parts, activations, dtype)
    columns = sum(part.shape[1] for part in parts)
    numbers, scale = torch.empty(len(parts[0]), columns), torch.empty(len(parts[0]), 1)
    triton.launch(parts, activations, numbers, scale, LARGEST[dtype])
    return numbers.to(dtype), scale


CASES: dict[str, tuple[list[int], list[str]]] = {
    "plain": ([48], ["none"]),
    "odd": ([37], ["gelu"]),
    "gelu": ([128], ["gelu_tanh"]),
    "silu": ([5], ["silu"]),
    "two parts": ([16, 65], ["none", "gelu_tanh"]),
    "three parts": ([3, 64, 17], ["silu", "none", "gelu"]),
}


@needs_triton
@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_kernel(case: str, dtype: torch.dtype, half: bool) -> None:
    sizes, activations = CASES[case]
    # Slices of a wider tensor: what a merged projection's split gives.
    parts = [rand(6, k + 3, seed=k)[:, 2:-1] * 3 for k in sizes]
    parts = [part.bfloat16() if half else part for part in parts]
    assert ops.held(parts)
    numbers, scale = kernel(parts, activations, dtype)
    wanted, wanted_scale = reference.quantize_rows(parts, activations, dtype)
    torch.testing.assert_close(scale, wanted_scale, rtol=2e-6, atol=0)
    # Where rounding is a matter of the last bit of the scale, neighbours are allowed.
    step = 1.0 if dtype == torch.int8 else wanted.float().abs().clamp(min=2**-6) / 8
    difference = (numbers.float() - wanted.float()).abs()
    assert bool((difference <= step * 1.001).all())
    assert float((difference > 0).float().mean()) < 0.02


@needs_triton
@DTYPES
@pytest.mark.parametrize("column", [7, 19], ids=["first tile", "second tile"])
def test_zeros_and_nan(dtype: torch.dtype, column: int) -> None:
    x = rand(3, 20)
    x[0], x[1, column] = 0, float("nan")
    numbers, scale = kernel([x], ["none"], dtype)
    assert not numbers[0].float().any()
    assert bool((scale[0] > 0).all())
    assert bool(scale[1].isnan().all())
    assert bool(scale[2].isfinite().all())
    assert kernel([x[:0]], ["none"], dtype)[0].shape == (0, 20)


@DTYPES
def test_the_operator_and_its_fake(dtype: torch.dtype) -> None:
    arguments: Any = ([rand(4, 8), rand(4, 8, seed=1)], ["none", "silu"], dtype)
    torch.library.opcheck(torch.ops.ditopt.quantize_rows.default, arguments)


@pytest.mark.parametrize(
    ("part", "fits"),
    [
        (torch.empty(2, 16384), True),
        (torch.empty(2, 16385), False),
        (torch.empty(8, 2).T, False),
        (torch.empty(2, 8, dtype=torch.float64), False),
    ],
)
def test_what_one_program_holds(part: Tensor, fits: bool) -> None:
    assert ops.held([part]) is fits
    assert not ops.held([part] * 4)
