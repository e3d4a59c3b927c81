"""From predicted error energies to PSNR: one gain per technique, corrected by every measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import least_squares

if TYPE_CHECKING:
    from ditopt.search.sensitivity import Floats

_PRIOR_SPREAD_DB = 10.0
"""How far the true gains may lie from the prior ones."""

_MEASUREMENT_SPREAD_DB = 0.5
"""How well the gains explain measurements of different plans."""

_SSIM_SPREAD_DB = 3.0
"""How far the relation of SSIM to PSNR may lie from its prior, in dB of 1 - SSIM."""

_DB = 10 / math.log(10)


class Energies(NamedTuple):
    """What each technique puts wrong into the trajectory, in units of the sampled tensor squared.

    Attributes:
        attention: of sparse heads.
        linears: of number formats.
        cache: of forecasts.
    """

    attention: float = 0.0
    linears: float = 0.0
    cache: float = 0.0


@dataclass(frozen=True)
class Observation:
    """A measured plan: its predicted energies, and the means that sampling gave."""

    energies: Energies
    psnr_db: float
    ssim: float = math.nan


@dataclass(frozen=True)
class ErrorModel:
    """``PSNR = -10 log10(sum_k g_k E_k / R^2)``, and ``1 - SSIM`` proportional to that energy.

    The energies say how much wrong is put into the trajectory; the gains say how much of it arrives
    at the result: what later steps correct, amplify or add up.

    Attributes:
        data_range: width R of the result's value range.
        gains_db: 10 log10 of each technique's gain.
        ssim_db: ``-10 log10(1 - SSIM)`` minus the PSNR in dB.
    """

    data_range: float
    gains_db: Energies
    ssim_db: float = -18.0

    @property
    def gains(self) -> Energies:
        """Factors of the energies."""
        return Energies(*(_power(gain) for gain in self.gains_db))

    def psnr_db(self, energies: Energies) -> float:
        """Predicted PSNR; infinite without any error."""
        energy = sum(g * e for g, e in zip(self.gains, energies, strict=True))
        if energy <= 0:
            return math.inf
        return -10 * math.log10(energy / self.data_range**2)

    def ssim(self, energies: Energies) -> float:
        """Predicted SSIM."""
        return max(0.0, 1 - _power(-(self.psnr_db(energies) + self.ssim_db)))

    def psnr_of_ssim(self, ssim: float) -> float:
        """The PSNR at which an SSIM is reached."""
        return -10 * math.log10(1 - ssim) - self.ssim_db

    def budget(self, psnr_db: float) -> float:
        """Largest sum of gained energies that still gives `psnr_db`."""
        return self.data_range**2 * _power(-psnr_db)

    def fit(self, observations: Sequence[Observation]) -> ErrorModel:
        """The gains that explain the observations best; this model's are the prior."""
        finite = [o for o in observations if sum(o.energies) > 0]
        prior = np.array(self.gains_db)

        def residuals(gains: Floats) -> Floats:
            trial = replace(self, gains_db=Energies(*gains))
            misses = [
                (trial.psnr_db(o.energies) - o.psnr_db) / _MEASUREMENT_SPREAD_DB for o in finite
            ]
            return np.array([*misses, *((gains - prior) / _PRIOR_SPREAD_DB)])

        gains = least_squares(residuals, prior).x
        fitted = replace(self, gains_db=Energies(*(float(gain) for gain in gains)))
        return replace(fitted, ssim_db=self._fitted_ssim(finite))

    def _fitted_ssim(self, observations: Sequence[Observation]) -> float:
        """Mean offset of what was measured, pulled towards the prior."""
        seen = [-10 * math.log10(1 - o.ssim) - o.psnr_db for o in observations if 0 <= o.ssim < 1]
        weight = (_MEASUREMENT_SPREAD_DB / _SSIM_SPREAD_DB) ** 2
        return (sum(seen) + weight * self.ssim_db) / (len(seen) + weight)


def _power(decibels: float) -> float:
    return math.exp(decibels / _DB)
