"""Formats of the weight alone: reference tables, sizes, edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.errors import WeightError
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import STORED_FORMATS, StoredFormat, derive
from ditopt.quantization.packing import pack, unpack

FORMATS = pytest.mark.parametrize("form", STORED_FORMATS.values(), ids=STORED_FORMATS.keys())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(form: StoredFormat, weight: Tensor) -> float:
    back = form.decode(form.encode(weight), *weight.shape, torch.float32)
    return float(20 * torch.log10(weight.norm() / (back - weight).norm()))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("int4_group", 19.5, 20.5),
        ("twin_log", 19.0, 20.2),
        ("codebook", 9.8, 11.5),
        ("int2_group", 8.3, 9.8),
        ("twin_log2", 8.3, 9.8),
    ],
)
def test_signal_to_noise_of_gaussian_weights(name: str, low: float, high: float) -> None:
    """The table of the reference says 19.9, 19.9 and 10.2 dB; 9.3 is the best of four levels."""
    assert low < decibels(STORED_FORMATS[name], draw(96, 512)) < high


@FORMATS
@pytest.mark.parametrize(("n", "k"), [(1, 16), (3, 48), (17, 128)])
def test_parts_are_as_announced(form: StoredFormat, n: int, k: int) -> None:
    made = form.encode(draw(n, k))
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == form.parts(n, k)
    assert form.decode(made, n, k, torch.bfloat16).dtype == torch.bfloat16


@FORMATS
@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 32), torch.full((4, 32), -2.5)], ids=["0", "-2.5"]
)
def test_constant_weights(form: StoredFormat, weight: Tensor) -> None:
    back = form.decode(form.encode(weight), 4, 32, torch.float32)
    assert float((back - weight).abs().max()) <= 1e-2


@FORMATS
def test_the_same_weight_gives_the_same_codes(form: StoredFormat) -> None:
    first, second = (form.encode(draw(16, 64)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("int4_group", 3.6), ("twin_log", 3.6), ("codebook", 6.5), ("int2_group", 7.0)],
)
def test_memory(name: str, at_least: float) -> None:
    n, k = 1152, 4608
    sizes = STORED_FORMATS[name].parts(n, k).values()
    held = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes)
    assert 2 * n * k / held >= at_least


def test_clipping_beats_the_full_range() -> None:
    heavy = draw(64, 128) / draw(64, 128, seed=1).abs().sqrt().clamp(min=0.1)
    form = STORED_FORMATS["int4_group"]
    amax = heavy.abs().amax(1, keepdim=True) / 7.5
    full = ((heavy / amax + 7.5).round().clamp(0, 15) - 7.5) * amax
    unclipped = float(20 * torch.log10(heavy.norm() / (full - heavy).norm()))
    assert decibels(form, heavy) > unclipped + 0.5


def test_one_sign_alone_is_a_row_too() -> None:
    weight = draw(8, 64).abs()
    assert decibels(STORED_FORMATS["twin_log"], weight) > 15
    assert decibels(STORED_FORMATS["twin_log"], -weight) > 15


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 5), pieces=st.integers(1, 9), bits=st.sampled_from([2, 4]), seed=st.integers()
)
def test_packing_loses_nothing(n: int, pieces: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    k = 8 // bits * pieces
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (n, pieces)
    assert torch.equal(unpack(packed, n, k, bits), codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = draw(4, 16)
    weight[1, 2] = bad
    with pytest.raises(WeightError, match="holds NaN or infinity"):
        derive(LinearRule(format="fp8_row"), [weight], [], {})
