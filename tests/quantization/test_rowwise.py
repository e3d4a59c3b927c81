"""8-bit products against float64 and integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.quantization.rowwise import FP8_ROW, INT8_ROW, RowFormat, quantize_rows

FORMATS = pytest.mark.parametrize("form", [FP8_ROW, INT8_ROW], ids=lambda f: f.name)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(form: RowFormat) -> Tensor:
    """Every number of the format that is used, float64 ascending."""
    if form is INT8_ROW:
        return torch.arange(-127, 128, dtype=torch.float64)
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return bits[bits.isfinite()].sort().values


@FORMATS
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 33),
    power=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
def test_each_number_is_the_nearest_of_the_format(
    form: RowFormat, rows: int, k: int, power: int, seed: int
) -> None:
    x = draw(rows, k, seed=seed) * 2.0**power
    numbers, scale = quantize_rows(x, form.largest, form.dtype)
    levels = grid(form) * scale.double()[..., None]  # [rows, 1, levels]
    best = (levels - x.double()[..., None]).abs().amin(-1)
    error = (numbers.double() * scale.double() - x.double()).abs()
    assert bool((error <= best * (1 + 1e-5) + 1e-6 * x.abs().amax().double()).all())


@FORMATS
def test_the_largest_of_a_row_keeps_its_value(form: RowFormat) -> None:
    x = draw(6, 40)
    numbers, scale = quantize_rows(x, form.largest, form.dtype)
    back = (numbers.double() * scale.double()).abs().amax(1)
    torch.testing.assert_close(back, x.abs().amax(1).double(), rtol=1e-6, atol=0)


@FORMATS
def test_rounding_twice_is_rounding_once(form: RowFormat) -> None:
    numbers, scale = quantize_rows(draw(6, 40), form.largest, form.dtype)
    again, same = quantize_rows(numbers.float() * scale, form.largest, form.dtype)
    assert torch.equal(again.float(), numbers.float())
    torch.testing.assert_close(same, scale, rtol=1e-6, atol=0)


@FORMATS
def test_a_row_of_zeros_stays_zero(form: RowFormat) -> None:
    numbers, scale = quantize_rows(torch.zeros(2, 8), form.largest, form.dtype)
    assert not numbers.float().any()
    assert bool((scale > 0).all())


@FORMATS
def test_nan_stays_in_its_row(form: RowFormat) -> None:
    x = draw(3, 8)
    x[1, 2] = float("nan")
    made = form.encode(draw(5, 8, seed=1))
    y = form.multiply(x, made, None, torch.float32, native=form is INT8_ROW)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


@FORMATS
@pytest.mark.parametrize("k", [2, 7, 256])
def test_the_product_is_that_of_the_rounded_operands(form: RowFormat, k: int) -> None:
    x, weight, bias = draw(9, k), draw(11, k, seed=1), draw(11, seed=2)
    made = form.encode(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in made.items()} == form.parts(11, k)
    numbers, scale = quantize_rows(x, form.largest, form.dtype)
    exact = (numbers.double() * scale) @ (made["weight"].double() * made["scale"].T).T + bias
    y = form.multiply(x, made, bias, torch.float32, native=form is INT8_ROW)
    assert float((y - exact).norm() / exact.norm()) < 1e-6


def test_int8_sums_are_those_of_int64() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (
        torch.randint(-127, 128, (33, 4096), generator=generator, dtype=torch.int8)
        for _ in range(2)
    )
    assert torch.equal(torch._int_mm(a, b.T).long(), a.long() @ b.long().T)


@pytest.mark.parametrize(("form", "low", "high"), [(FP8_ROW, 28.0, 29.5), (INT8_ROW, 38.0, 40.0)])
def test_signal_to_noise_of_gaussian_layers(form: RowFormat, low: float, high: float) -> None:
    """As the table of the reference: 3.7% for fp8, 1.1% for int8."""
    x, weight = draw(256, 576), draw(64, 576, seed=1)
    exact = x.double() @ weight.double().T
    y = form.multiply(x, form.encode(weight), None, torch.float32, native=form is INT8_ROW)
    assert low < float(20 * torch.log10(exact.norm() / (y - exact).norm())) < high


@FORMATS
def test_a_half_precision_layer_gives_half_precision(form: RowFormat) -> None:
    x, weight, bias = (t.bfloat16() for t in (draw(4, 16), draw(8, 16, seed=1), draw(8, seed=2)))
    made = form.encode(weight.float())
    y = form.multiply(x, made, bias, torch.bfloat16, native=form is INT8_ROW)
    assert y.dtype == torch.bfloat16
    exact = x.double() @ weight.double().T + bias.double()
    assert float((y - exact).norm() / exact.norm()) < 0.06
