"""How far a result is from the dense one: PSNR, SSIM and the largest error.

The dense result is what the same model gives for the same seed in eager PyTorch. In low precision
`torch.compile` alone moves the result too; its PSNR is the noise floor of every comparison.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SSIM_WINDOW = 11  # pixels; Gaussian of sigma 1.5, as Wang et al. 2004 (SSIM) define it
_SSIM_SIGMA = 1.5


@dataclass(frozen=True)
class Quality:
    """One result against the dense result of the same seed.

    Attributes:
        psnr_db: peak signal-to-noise ratio in dB; infinite where the results are equal.
        ssim: structural similarity over the last two axes, at most 1.
        max_error: largest absolute difference, in the result's own unit.
    """

    psnr_db: float
    ssim: float
    max_error: float


@dataclass(frozen=True)
class QualitySummary:
    """Several seeds together.

    Attributes:
        mean_psnr_db: mean of the per-seed dB; a goal is about this number.
        min_psnr_db: the worst seed.
        p10_psnr_db: the tenth percentile over seeds.
        ssim: mean over seeds.
        max_error: largest over seeds.
    """

    mean_psnr_db: float
    min_psnr_db: float
    p10_psnr_db: float
    ssim: float
    max_error: float


def value_range(dense: Tensor, data_range: float | None = None) -> float:
    """Width R of the value range that PSNR and SSIM refer to.

    Args:
        dense: the dense result.
        data_range: the workload's own; without it R is 1 where dense lies in [0, 1], 2 where it
            lies in [-1, 1], and else the distance from its least to its largest value.
    """
    if data_range is not None:
        return data_range
    low, high = float(dense.min()), float(dense.max())
    if low >= 0 and high <= 1:
        return 1.0
    if low >= -1 and high <= 1:
        return 2.0
    return high - low


def psnr(result: Tensor, dense: Tensor, data_range: float | None = None) -> float:
    """10 log10(R^2 / MSE) over the whole result, in dB; infinite where the two are equal."""
    _same_shape(result, dense)
    error = float((result.double() - dense.double()).square().mean())
    if error == 0:
        return math.inf
    return 10 * math.log10(value_range(dense, data_range) ** 2 / error)


def ssim(result: Tensor, dense: Tensor, data_range: float | None = None) -> float:
    """Mean structural similarity of all pictures in the last two axes of [..., H, W]."""
    _same_shape(result, dense)
    if dense.dim() < 2:
        raise ValueError(f"SSIM needs at least two axes, got shape {tuple(dense.shape)}")
    height, width = dense.shape[-2:]
    a = result.double().reshape(-1, 1, height, width)
    b = dense.double().reshape(-1, 1, height, width)
    rows, columns = (_gaussian(min(_SSIM_WINDOW, size)).to(a.device) for size in (height, width))

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, rows.view(1, 1, -1, 1)), columns.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    scale = value_range(dense, data_range)
    c1, c2 = (0.01 * scale) ** 2, (0.03 * scale) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())


def _gaussian(size: int) -> Tensor:
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    return weights / weights.sum()


def compare(result: Tensor, dense: Tensor, data_range: float | None = None) -> Quality:
    """All three measures of a result of shape [..., H, W]; one axis alone counts as one row."""
    result = result.to(dense.device)
    if dense.dim() < 2:
        result, dense = result.reshape(1, -1), dense.reshape(1, -1)
    return Quality(
        psnr_db=psnr(result, dense, data_range),
        ssim=ssim(result, dense, data_range),
        max_error=float((result.double() - dense.double()).abs().max()),
    )


def summarize(qualities: Sequence[Quality]) -> QualitySummary:
    """The seeds of one variant together; at least one."""
    decibels = sorted(quality.psnr_db for quality in qualities)
    return QualitySummary(
        mean_psnr_db=statistics.fmean(decibels),
        min_psnr_db=decibels[0],
        p10_psnr_db=_percentile(decibels, 0.1),
        ssim=statistics.fmean(quality.ssim for quality in qualities),
        max_error=max(quality.max_error for quality in qualities),
    )


def _percentile(ascending: Sequence[float], share: float) -> float:
    """Linear interpolation between neighbours, which may be infinite."""
    position = share * (len(ascending) - 1)
    below, above = ascending[math.floor(position)], ascending[math.ceil(position)]
    return below if below == above else below + (position % 1) * (above - below)


def _same_shape(result: Tensor, dense: Tensor) -> None:
    if result.shape != dense.shape:
        raise ValueError(f"shapes differ: {tuple(result.shape)} and {tuple(dense.shape)}")
