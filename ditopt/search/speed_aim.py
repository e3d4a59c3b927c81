"""The plan of highest quality within a time, or a memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ditopt.search.aims import WORTH_DB, WORTH_SPEED, Outcome, Trial, observations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ditopt.plan import Goal
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Candidate, Predictor


class SpeedAim:
    """The plan of highest PSNR whose measured speedup, and predicted memory, are within a goal."""

    margin_db = 0.0

    def __init__(self, predictor: Predictor, model: ErrorModel, goal: Goal, margin: float) -> None:
        self.model = model
        self._predictor, self._prior = predictor, model
        self._target, self._margin = goal.target_speedup, margin
        self._max_bytes = goal.max_memory_bytes or math.inf
        self._kept_promise = 1.0

    def propose(self) -> Candidate | None:
        """See `Aim`."""
        if self._target is None:
            return self._predictor.most_exact(self.model, math.inf, self._max_bytes)
        aimed = self._target * (1 + self._margin) / self._kept_promise
        allowed = self._predictor.dense_seconds / aimed
        return self._predictor.most_exact(self.model, allowed, self._max_bytes)

    def next_cheaper(self, best: Trial) -> Candidate | None:
        """See `Aim`. Quality is as high as it can be, so nothing is to be saved."""
        return None

    def learn(self, trials: Sequence[Trial]) -> None:
        """See `Aim`. Allows less predicted time if the last plan was slower than predicted."""
        self.model = self._prior.fit(observations(trials))
        last = trials[-1]
        promised = self._predictor.dense_seconds / last.candidate.seconds
        self._kept_promise = last.outcome.speedup / promised

    def tuned(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return self._target is None or outcome.speedup >= self._target

    def met(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return self.tuned(outcome)

    def close(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return self._target is None or (1 <= outcome.speedup / self._target <= 1 + 3 * self._margin)

    def promises(self, candidate: Candidate, best: Trial) -> bool:
        """See `Aim`."""
        before, after = (self.model.psnr_db(c.energies) for c in (best.candidate, candidate))
        return after >= before + WORTH_DB

    def best(self, passing: Sequence[Trial]) -> Trial:
        """See `Aim`."""
        return max(passing, key=lambda trial: trial.outcome.psnr_db)

    def exceeds(self, outcome: Outcome) -> bool:
        """See `Aim`. More speed than asked for is not waste."""
        return False

    def shift(self, tuned: Outcome, audited: Outcome) -> None:
        """See `Aim`."""
        self._margin = max(self._margin, tuned.speedup / audited.speedup - 1) + WORTH_SPEED

    def attainable(self, trials: Sequence[Trial]) -> str:
        """See `Aim`."""
        if trials:
            best = max(trials, key=lambda trial: trial.outcome.speedup)
            return f"the fastest plan that was sampled gave {best.outcome}"
        fastest = self._predictor.fastest(self.model, -math.inf, self._max_bytes)
        if fastest is None:
            return f"the smallest plan is predicted to need {self._predictor.least_bytes} bytes"
        speedup = self._predictor.dense_seconds / fastest.seconds
        return f"the fastest plan of all is predicted to give {speedup:.2f}x"
