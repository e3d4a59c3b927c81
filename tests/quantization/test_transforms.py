"""Transforms change nothing but rounding; what each is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.quantization import LinearRule, transforms
from ditopt.quantization.layer import compute, derive
from ditopt.quantization.transforms import (
    NEEDS,
    balance_scales,
    regular_hadamard,
    rotation_block,
    zigzag,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def error(transform: str, form: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Relative error of a layer, in the dtype of its weight."""
    rule = LinearRule.model_validate({"format": form, "transform": transform})
    statistics = {"mean": x.mean(0), "amax": x.abs().amax(0)}
    biases = [] if bias is None else [bias]
    made = derive(rule, [weight], biases, statistics)
    n, k = weight.shape
    y = compute(rule, x, made, bias, n=n, k=k, dtype=x.dtype, native=form == "int8_row")
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return float((y - exact).norm() / exact.norm())


@pytest.mark.parametrize("transform", ["centre", "balance", "rotate", "rotate_twice"])
@pytest.mark.parametrize("biased", [True, False])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_exact_in_float64(transform: str, biased: bool, n: int, k: int, seed: int) -> None:
    x, weight = draw(7, 4 * k, seed=seed) * 10 + 3, draw(n, 4 * k, seed=seed + 1)
    bias = draw(n, seed=seed + 2) if biased else None
    assert error(transform, "none", x, weight, bias) <= 1e-12


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
def test_a_regular_hadamard_matrix(size: int) -> None:
    matrix = regular_hadamard(size)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64))
    assert float(matrix.abs().max() - matrix.abs().min()) == 0


def test_other_sizes_have_none() -> None:
    with pytest.raises(ValueError, match="expected a power of 4, got 8"):
        regular_hadamard(8)


@pytest.mark.parametrize(("k", "block"), [(1152, 64), (48, 16), (12, 4), (6, None)])
def test_blocks_divide_the_width(k: int, block: int | None) -> None:
    assert rotation_block(k) == block


def test_channels_without_values_keep_their_scale() -> None:
    amax, weight = torch.tensor([0.0, 4.0, 1.0, 1.0]), torch.ones(2, 4)
    weight[:, 3] = 0
    scales = balance_scales(amax, weight)
    torch.testing.assert_close(scales[0], scales[3])
    assert bool(scales.isfinite().all())
    torch.testing.assert_close(scales[1] / scales[2], torch.tensor(2.0))


def compensated() -> tuple[Tensor, Tensor]:
    """Eight channels 200 times larger, with weights as much smaller: what training leaves."""
    x, weight = draw(256, 256), draw(64, 256, seed=1)
    x[:, :8] *= 200
    weight[:, :8] /= 200
    return x.float(), weight.float()


def test_int8_needs_balance_where_salient_channels_meet_small_weights() -> None:
    x, weight = compensated()
    plain, balanced = (error(t, "int8_row", x, weight, None) for t in ("none", "balance"))
    assert plain > 0.3
    assert balanced < 0.02


def test_rotation_balances_first() -> None:
    x, weight = compensated()
    assert error("rotate", "int8_row", x, weight, None) < 0.02


@settings(max_examples=20, deadline=None)
@given(blocks=st.integers(1, 7), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_zigzag_deals_every_channel_once(blocks: int, size: int, seed: int) -> None:
    peaks = draw(blocks * size, seed=seed).abs()
    order = zigzag(peaks, size)
    assert torch.equal(order.sort().values, torch.arange(blocks * size))
    dealt = peaks[order].reshape(blocks, size).sort(1, descending=True).values
    # The r-th largest of every block are the r-th hand of the ranking.
    hands = peaks.sort(descending=True).values.reshape(size, blocks)
    assert torch.equal(dealt.t().sort(1).values, hands.sort(1).values)


def test_rotating_twice_evens_out_blocks() -> None:
    """One block of channels that balance cannot level, since its weights are as large."""
    x, weight = draw(256, 256).float(), draw(64, 256, seed=1).float()
    x[:, :64] *= 40
    weight[:, :64] *= 40
    once, twice = (error(t, "int8_row", x, weight, None) for t in ("rotate", "rotate_twice"))
    assert twice < once


def test_centring_helps_fp8_on_modulated_inputs() -> None:
    x, weight = (draw(256, 256) + 3).float(), draw(64, 256, seed=1).float()
    rule = {
        t: LinearRule.model_validate({"format": "fp8_row", "transform": t})
        for t in ("none", "centre")
    }
    exact = x.double() @ weight.double().T
    found = {}
    for transform, one in rule.items():
        made = derive(one, [weight], [], {"mean": x.mean(0)})
        y = compute(one, x, made, None, n=64, k=256, dtype=torch.float32, native=False)
        found[transform] = float((y - exact).norm() / exact.norm())
    assert found["centre"] < found["none"] / 2


def test_operands_have_the_shapes_that_are_announced() -> None:
    for transform in ("none", *NEEDS):
        statistics = {"mean": torch.zeros(12), "amax": torch.ones(12)}
        *_, operands = transforms.fold(transform, torch.randn(5, 12), None, statistics)
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in operands.items()}
        assert shapes == transforms.parts(transform, 12, torch.float32)
