"""The fastest plan of a quality."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ditopt.search.aims import WORTH_DB, WORTH_SPEED, Outcome, Trial, observations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ditopt.plan import Goal
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Candidate, Predictor

_CAREFUL = 0.97
"""Share of the dense time that the most careful plan worth having takes."""

_CHEAPER_DB = tuple(0.5 * 1.5**k for k in range(11))
"""Drops of predicted PSNR, up to 29 dB, in which the next cheaper plan is looked for."""


class QualityAim:
    """The fastest plan whose mean PSNR, or SSIM, or both over seeds are at least so much.

    Args:
        predictor: what is known from the profile.
        model: predictions start from it.
        goal: with a quality; a speedup and a memory in it are kept, too.
        margin_db: how far above the quality the tune mean must lie, in dB of squared error.
        slack_db: overshoot at which a faster plan is no longer looked for.
    """

    def __init__(
        self,
        predictor: Predictor,
        model: ErrorModel,
        goal: Goal,
        margin_db: float,
        slack_db: float,
    ) -> None:
        self.model = model
        self.margin_db = margin_db
        self._predictor, self._prior, self._goal = predictor, model, goal
        self._slack_db, self._widening_db = slack_db, margin_db
        self._max_bytes = goal.max_memory_bytes or math.inf
        self._level_db: float | None = None

    def propose(self) -> Candidate | None:
        """See `Aim`."""
        level_db = self._needed_db if self._level_db is None else self._level_db
        found = self._fastest(level_db)
        if found is not None:
            return found
        # Predictions may be too pessimistic: sampling decides on the most careful plan.
        careful = _CAREFUL * self._predictor.dense_seconds
        return self._predictor.most_exact(self.model, careful, self._max_bytes)

    def next_cheaper(self, best: Trial) -> Candidate | None:
        """See `Aim`."""
        for below_db in _CHEAPER_DB:
            found = self._fastest(self._predicted_db(best) - below_db)
            if found is not None and found.seconds < best.candidate.seconds:
                return found
        return None

    def learn(self, trials: Sequence[Trial]) -> None:
        """See `Aim`. Decides what PSNR to ask of the model next.

        Without a failure: the goal. Without a success: so much more as the model was wrong, and
        after repeated failures more than that. With both: half way between them.
        """
        self.model = self._prior.fit(observations(trials))
        passed = [trial for trial in trials if self._surplus_db(trial.outcome) >= self.margin_db]
        failed = [trial for trial in trials if self._surplus_db(trial.outcome) < self.margin_db]
        if not failed:
            self._level_db = self._needed_db
        elif not passed:
            wrong = max(
                self._predicted_db(trial) - self._goal_db - self._surplus_db(trial.outcome)
                for trial in failed
            )
            shortfall = max(WORTH_DB, self.margin_db - self._surplus_db(failed[-1].outcome))
            self._level_db = self._needed_db + max(0.0, wrong) + (len(failed) - 1) * shortfall
        else:
            highest = max(self._predicted_db(trial) for trial in failed)
            lowest = min(self._predicted_db(trial) for trial in passed)
            self._level_db = (highest + lowest) / 2 if lowest > highest else lowest

    def tuned(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return self._surplus_db(outcome) >= self.margin_db and self._fast_enough(outcome)

    def met(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return self._surplus_db(outcome) >= 0 and self._fast_enough(outcome)

    def close(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        beyond = self._surplus_db(outcome) - self.margin_db  # fresh seeds: so much and a margin
        return self._fast_enough(outcome) and 0 <= beyond <= self._slack_db - self._widening_db

    def promises(self, candidate: Candidate, best: Trial) -> bool:
        """See `Aim`."""
        return candidate.seconds <= (1 - WORTH_SPEED) * best.candidate.seconds

    def best(self, passing: Sequence[Trial]) -> Trial:
        """See `Aim`. By predicted time: measured times would make the plan depend on the day."""
        return min(passing, key=lambda trial: trial.candidate.seconds)

    def exceeds(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return self._surplus_db(outcome) > self._slack_db

    def shift(self, tuned: Outcome, audited: Outcome) -> None:
        """See `Aim`. An audit that failed widens the margin even where fresh seeds are as good."""
        behind = self._surplus_db(tuned) - self._surplus_db(audited)
        if self.met(audited):
            self.margin_db = behind + self._widening_db
        else:
            self.margin_db = max(self.margin_db, behind) + WORTH_DB

    def attainable(self, trials: Sequence[Trial]) -> str:
        """See `Aim`."""
        if not trials:
            return "no plan that is faster than dense is predicted to meet it"
        slow = [t for t in trials if self._surplus_db(t.outcome) >= self.margin_db]
        if slow:
            fastest = max(slow, key=lambda trial: trial.outcome.speedup)
            return f"the fastest plan of that quality gave {fastest.outcome}"
        best = max(trials, key=lambda trial: trial.outcome.psnr_db)
        return f"the best plan faster than dense gave {best.outcome}"

    def _fastest(self, level_db: float) -> Candidate | None:
        found = self._predictor.fastest(self.model, level_db, self._max_bytes)
        if found is None or math.isfinite(self._max_bytes):
            return found
        return found if found.seconds < self._predictor.dense_seconds else None

    def _fast_enough(self, outcome: Outcome) -> bool:
        return self._goal.target_speedup is None or outcome.speedup >= self._goal.target_speedup

    def _surplus_db(self, outcome: Outcome) -> float:
        """How far above the goal, in dB of squared error."""
        surplus = math.inf
        if self._goal.min_psnr_db is not None:
            surplus = outcome.psnr_db - self._goal.min_psnr_db
        if self._goal.min_ssim is not None:
            wrong = max(1 - outcome.ssim, 1e-12)
            surplus = min(surplus, 10 * math.log10((1 - self._goal.min_ssim) / wrong))
        return surplus

    def _predicted_db(self, trial: Trial) -> float:
        return self.model.psnr_db(trial.candidate.energies)

    @property
    def _goal_db(self) -> float:
        """The goal as a PSNR."""
        levels = [self._goal.min_psnr_db or -math.inf]
        if self._goal.min_ssim is not None:
            levels.append(self.model.psnr_of_ssim(self._goal.min_ssim))
        return max(levels)

    @property
    def _needed_db(self) -> float:
        return self._goal_db + self.margin_db
