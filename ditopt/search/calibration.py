"""From predicted error energies to PSNR: a model with two gains, corrected by every measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import least_squares

if TYPE_CHECKING:
    from ditopt.search.problem import Floats

_PRIOR_SPREAD_DB = 10.0
"""How far the true gains may lie from the prior ones."""

_MEASUREMENT_SPREAD_DB = 0.5
"""How well two gains explain measurements of different plans."""

_DB = 10 / math.log(10)


@dataclass(frozen=True)
class Observation:
    """A measured plan: its predicted energies, and the mean PSNR that sampling gave."""

    attention_error: float
    cache_error: float
    psnr_db: float


@dataclass(frozen=True)
class ErrorModel:
    """``PSNR = -10 log10((g_a E_attention + g_c E_cache) / R^2)``.

    The energies say how much wrong is put into the trajectory; the gains say how much of it arrives
    at the result: what later steps correct, amplify or add up.

    Attributes:
        data_range: width R of the result's value range.
        attention_gain_db: 10 log10 g_a.
        cache_gain_db: 10 log10 g_c.
    """

    data_range: float
    attention_gain_db: float = 0.0
    cache_gain_db: float = 0.0

    def psnr_db(self, attention_error: float, cache_error: float) -> float:
        """Predicted PSNR; infinite without any error."""
        energy = attention_error * _power(self.attention_gain_db)
        energy += cache_error * _power(self.cache_gain_db)
        if energy <= 0:
            return math.inf
        return -10 * math.log10(energy / self.data_range**2)

    def attention_budget(self, psnr_db: float, cache_error: float) -> float:
        """Largest attention error that still gives `psnr_db` beside a cache error; may be < 0."""
        total = self.data_range**2 * _power(-psnr_db)
        return (total - cache_error * _power(self.cache_gain_db)) / _power(self.attention_gain_db)

    def fit(self, observations: Sequence[Observation]) -> ErrorModel:
        """The gains that explain the observations best; this model's are the prior."""
        finite = [o for o in observations if o.attention_error + o.cache_error > 0]
        prior = np.array([self.attention_gain_db, self.cache_gain_db])

        def residuals(gains: Floats) -> Floats:
            trial = replace(self, attention_gain_db=gains[0], cache_gain_db=gains[1])
            misses = [
                (trial.psnr_db(o.attention_error, o.cache_error) - o.psnr_db)
                / _MEASUREMENT_SPREAD_DB
                for o in finite
            ]
            return np.array([*misses, *((gains - prior) / _PRIOR_SPREAD_DB)])

        gains = least_squares(residuals, prior).x
        return replace(self, attention_gain_db=float(gains[0]), cache_gain_db=float(gains[1]))


def _power(decibels: float) -> float:
    return math.exp(decibels / _DB)
