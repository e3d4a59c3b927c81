import math

import pytest
import torch

from ditopt import metrics


@pytest.mark.parametrize(
    ("values", "given", "expected"),
    [
        ([0.0, 0.4, 1.0], None, 1.0),
        ([-0.2, 0.4, 1.0], None, 2.0),
        ([-3.0, 0.0, 2.0], None, 5.0),
        ([-3.0, 0.0, 2.0], 2.0, 2.0),
    ],
)
def test_the_range_follows_the_rule(values, given, expected):
    assert metrics.value_range(torch.tensor(values), given) == expected


def test_psnr_of_a_known_error():
    dense = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    assert metrics.psnr(dense + 0.01, dense) == pytest.approx(40.0, abs=1e-4)  # 20 log10(1 / 0.01)
    assert metrics.psnr(dense, dense) == math.inf


def test_psnr_does_not_round_in_low_precision():
    dense = torch.full((64, 64), 100.0, dtype=torch.bfloat16)
    dense[0, 0] = 0
    result = dense.clone()
    result[0, 1] = 99
    expected = 10 * math.log10(100**2 / (1 / 64**2))
    assert metrics.psnr(result, dense) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 31), (3, 24, 31), (2, 3, 16, 16)])
def test_ssim_agrees_with_scikit_image(shape):
    structural = pytest.importorskip("skimage.metrics").structural_similarity
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(shape, generator=generator, dtype=torch.float64)
    result = dense + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    pairs = zip(result.reshape(-1, *shape[-2:]), dense.reshape(-1, *shape[-2:]), strict=True)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [structural(b.numpy(), a.numpy(), data_range=1.0, **options) for a, b in pairs]
    # the same formula in float64; what is left is the order of summation
    assert metrics.ssim(result, dense, 1.0) == pytest.approx(
        sum(expected) / len(expected), rel=1e-9
    )


def test_ssim_of_equal_and_of_small_pictures():
    small = torch.rand(3, 4, 5)
    assert metrics.ssim(small, small) == pytest.approx(1.0)
    assert metrics.ssim(small.flip(-1), small) < 0.9


def test_compare_puts_them_together():
    dense = torch.rand(2, 16, 16)
    quality = metrics.compare(dense + 0.125, dense)
    assert quality.max_error == pytest.approx(0.125)
    assert quality.psnr_db == pytest.approx(20 * math.log10(8), abs=1e-4)


def test_compare_takes_one_axis_as_one_row():
    dense = torch.rand(16)
    assert metrics.compare(dense, dense).ssim == pytest.approx(1.0)


def test_summary_is_about_decibels_per_seed():
    qualities = [metrics.Quality(20.0 + i, 0.9, 0.1 * i) for i in range(11)]
    summary = metrics.summarize(qualities)
    assert summary.mean_psnr_db == 25.0
    assert summary.min_psnr_db == 20.0
    assert summary.p10_psnr_db == pytest.approx(21.0)
    assert summary.max_error == pytest.approx(1.0)


def test_summary_of_equal_results_is_infinite():
    summary = metrics.summarize([metrics.Quality(math.inf, 1.0, 0.0)] * 2)
    assert summary.mean_psnr_db == summary.p10_psnr_db == math.inf


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 2\) and \(2, 3\)"):
        metrics.psnr(torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least two axes"):
        metrics.ssim(torch.ones(3), torch.ones(3))
