"""The fused forecast against fp64, on the GPU or in Triton's interpreter where it is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from ditopt.kernels.forecast import api, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": lambda shape: rand(*shape),
    "patch embedding": lambda shape: rand(*shape).mT.contiguous().mT,
    "slice": lambda shape: rand(*shape[:-1], shape[-1] + 3)[..., 1:-2],
    "every other row": lambda shape: rand(*shape[:-2], 2 * shape[-2], shape[-1])[..., ::2, :],
    "one value": lambda shape: rand(1).expand(shape),
}
ROWS = [[1.0], [1.75, -0.75], [2.5, -2.0, 0.5], [0.5, 0.5, 0.5, 0.5, -0.25, -0.25, -0.25, -0.25]]


def exact(base: Tensor | None, residuals: list[Tensor], row: list[float]) -> Tensor:
    total = sum(c * r.double() for c, r in zip(row, residuals, strict=True))
    assert isinstance(total, Tensor)
    return total if base is None else base.double() + total


def fused(base: Tensor | None, residuals: list[Tensor], row: list[float]) -> Tensor:
    from ditopt.kernels.forecast import triton

    return triton.forecast(base, residuals, torch.tensor(row, device=DEVICE))


@needs_triton
@pytest.mark.parametrize("shape", [(2, 70, 65), (1, 3, 5, 130), (7, 9), (5,), (1, 64, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_base(layout: str, shape: tuple[int, ...]) -> None:
    if len(shape) == 1 and layout in ("patch embedding", "every other row"):
        pytest.skip("one dimension")
    torch.manual_seed(0)
    base = LAYOUTS[layout](shape)
    residuals = [rand(*shape) for _ in range(2)]
    result = fused(base, residuals, ROWS[1])
    assert result.stride() == residuals[0].stride()
    torch.testing.assert_close(
        result, exact(base, residuals, ROWS[1]).float(), atol=1e-5, rtol=1e-5
    )


@needs_triton
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("row", ROWS, ids=len)
def test_accumulates_in_float32(row: list[float], dtype: torch.dtype, with_base: bool) -> None:
    torch.manual_seed(0)
    base = rand(3, 50, 20).mT.to(dtype) if with_base else None
    residuals = [50 * rand(3, 20, 50).to(dtype) for _ in row]
    wide = exact(base, residuals, row)
    # Within a unit of the last place: the sum in fp32 is rounded to the dtype once.
    torch.testing.assert_close(
        fused(base, residuals, row).double(), wide, atol=1e-4, rtol=torch.finfo(dtype).eps
    )


@needs_triton
def test_rising_ramp_rises() -> None:
    ramp = [torch.full((4, 3), value, device=DEVICE) for value in (2.0, 1.0)]  # newest first
    assert torch.equal(fused(None, ramp, [2.0, -1.0]), torch.full((4, 3), 3.0, device=DEVICE))


@needs_triton
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.gpu
def test_cuda_is_fused_and_agrees_with_the_reference() -> None:
    torch.manual_seed(0)
    base = torch.randn(2, 3000, 1100, device="cuda", dtype=torch.bfloat16).mT
    residuals = [torch.randn_like(base.contiguous()) for _ in range(3)]
    row = torch.tensor(ROWS[2], device="cuda")
    assert api.fuses(base, residuals, row)
    wide = exact(base, residuals, ROWS[2])
    for result in (api.forecast(base, residuals, row), reference.forecast(base, residuals, row)):
        torch.testing.assert_close(result.double(), wide, atol=1e-4, rtol=2**-7)


def test_what_the_kernel_declines() -> None:
    x, row = torch.randn(4, 6), torch.tensor([1.0])
    assert not api.fuses(None, [x], row)  # a CPU
    if CUDA:
        x, row = x.cuda(), row.cuda()
        assert api.fuses(x, [x], row)
        assert not api.fuses(x, [x.mT], row)
        assert not api.fuses(x.double(), [x.double()], row.double())
        assert not api.fuses(x, [x] * 9, torch.ones(9, device="cuda"))
    torch.testing.assert_close(api.forecast(x, [x.mT.contiguous().mT], row), 2 * x)
