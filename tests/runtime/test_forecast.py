from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.runtime import forecast

row = st.lists(st.floats(-3, 3), min_size=0, max_size=3).map(lambda c: [*c, 1.0 - sum(c)])


@settings(deadline=None)
@given(row, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_constant_residuals_are_forecast_exactly(c: list[float], dtype: torch.dtype) -> None:
    base, residual = torch.randn(2, 5).to(dtype), torch.randn(2, 5).to(dtype)
    result = forecast(base, [residual] * len(c), torch.tensor(c, dtype=torch.float64))
    assert result.dtype == dtype
    torch.testing.assert_close(
        result, base + residual, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=1e-2
    )


def test_rising_ramp_rises() -> None:
    ramp = [torch.full((3,), float(value)) for value in (2.0, 1.0)]  # newest first
    torch.testing.assert_close(
        forecast(None, ramp, torch.tensor([2.0, -1.0])), torch.full((3,), 3.0)
    )


@pytest.mark.parametrize("with_base", [False, True])
def test_accumulates_in_float32(with_base: bool) -> None:
    torch.manual_seed(0)
    base = torch.randn(1000).bfloat16() if with_base else None
    residuals = [torch.randn(1000).bfloat16() * 50 for _ in range(3)]
    c = torch.tensor([4.0, -5.0, 2.0])
    wide = sum(w.double() * r.double() for w, r in zip(c, residuals, strict=True))
    wide = wide if base is None else wide + base.double()
    assert torch.equal(forecast(base, residuals, c), wide.bfloat16())


def test_result_owns_its_storage() -> None:
    residual = torch.randn(4)
    result = forecast(None, [residual], torch.tensor([1.0]))
    assert result.untyped_storage().data_ptr() != residual.untyped_storage().data_ptr()


def test_compiles_once_for_all_rows() -> None:
    compiled = torch.compile(forecast, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    base, residuals = torch.randn(3), [torch.randn(3), torch.randn(3)]
    for c in ([2.0, -1.0], [1.5, -0.5], [3.0, -2.0]):
        compiled(base, residuals, torch.tensor(c))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
