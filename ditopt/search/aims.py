"""What a goal means to the search: what to sample next, and what a measurement teaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ditopt.search.calibration import Observation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ditopt.plan import Plan
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Candidate

WORTH_SPEED, WORTH_DB = 0.02, 0.25
"""Differences that are worth a measurement; smaller ones cost more than they bring."""


@dataclass(frozen=True)
class Outcome:
    """Several seeds under one plan: mean PSNR in dB and SSIM, dense time over the median time."""

    psnr_db: float
    speedup: float
    ssim: float = math.nan

    def __str__(self) -> str:
        return f"{self.psnr_db:.1f} dB at {self.speedup:.2f}x"


@dataclass(frozen=True)
class Trial:
    """A candidate as a plan, with its outcome on the tune seeds."""

    candidate: Candidate
    plan: Plan
    outcome: Outcome


class Aim(Protocol):
    """One kind of goal.

    Attributes:
        model: turns predicted errors into PSNR.
        margin_db: how far above a quality goal the tune mean must lie.
    """

    model: ErrorModel
    margin_db: float

    def propose(self) -> Candidate | None:
        """The best candidate by prediction; None where nothing faster than dense is predicted."""

    def next_cheaper(self, best: Trial) -> Candidate | None:
        """A faster candidate than one that is better than it has to be, or None."""

    def learn(self, trials: Sequence[Trial]) -> None:
        """Correct the predictions by everything sampled on tune seeds so far."""

    def tuned(self, outcome: Outcome) -> bool:
        """Whether tune seeds meet the goal with its margin."""

    def met(self, outcome: Outcome) -> bool:
        """Whether fresh seeds meet the goal."""

    def close(self, outcome: Outcome) -> bool:
        """Whether the goal is met so closely that nothing better is to be expected."""

    def promises(self, candidate: Candidate, best: Trial) -> bool:
        """Whether a candidate is predicted to beat a passing trial by enough to sample it."""

    def best(self, passing: Sequence[Trial]) -> Trial:
        """The one to audit."""

    def exceeds(self, outcome: Outcome) -> bool:
        """Whether fresh seeds are so much better than the goal that a faster plan should do."""

    def shift(self, tuned: Outcome, audited: Outcome) -> None:
        """After an audit far from the goal: fresh seeds differ from tune seeds by so much."""

    def attainable(self, trials: Sequence[Trial]) -> str:
        """The best that is known to be possible, for people."""


def observations(trials: Sequence[Trial]) -> list[Observation]:
    """What trials teach the error model."""
    return [Observation(t.candidate.energies, t.outcome.psnr_db, t.outcome.ssim) for t in trials]
