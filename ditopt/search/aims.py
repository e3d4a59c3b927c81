"""What a goal means to the search: what to sample next, and what a measurement teaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ditopt.search.calibration import ErrorModel, Observation

if TYPE_CHECKING:
    from ditopt.plan import Plan
    from ditopt.search.prediction import Candidate, Predictor


_CAREFUL = 0.97
"""Share of the dense time that the most careful plan worth having takes."""


_WORTH_SPEED, _WORTH_DB = 0.02, 0.25
"""Differences that are worth a measurement; smaller ones cost more than they bring."""


@dataclass(frozen=True)
class Outcome:
    """Several seeds under one plan: mean PSNR in dB, and dense time over the median time."""

    psnr_db: float
    speedup: float

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
        margin_db: how far above a PSNR goal the tune mean must lie.
    """

    model: ErrorModel
    margin_db: float

    def propose(self) -> Candidate | None:
        """The best candidate by prediction; None where nothing faster than dense is predicted."""

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

    def widen(self, tuned: Outcome, audited: Outcome) -> None:
        """Aim higher after an audit that failed, by how much fresh seeds fell behind."""

    def attainable(self, trials: Sequence[Trial]) -> str:
        """The best that is known to be possible, for people."""


class QualityAim:
    """The fastest plan whose mean PSNR over seeds is at least `min_psnr_db`."""

    def __init__(
        self,
        predictor: Predictor,
        model: ErrorModel,
        min_psnr_db: float,
        margin_db: float,
        slack_db: float,
    ) -> None:
        self.model = model
        self.margin_db = margin_db
        self._predictor, self._prior = predictor, model
        self._min_psnr_db, self._slack_db = min_psnr_db, slack_db
        self._level_db: float | None = None

    def propose(self) -> Candidate | None:
        """See `Aim`."""
        level_db = self._threshold_db if self._level_db is None else self._level_db
        found = _if_faster(self._predictor.fastest(self.model, level_db), self._predictor)
        if found is not None:
            return found
        # Predictions may be too pessimistic: sampling decides on the most careful plan.
        careful = _CAREFUL * self._predictor.dense_seconds
        return self._predictor.most_exact(self.model, careful)

    def learn(self, trials: Sequence[Trial]) -> None:
        """See `Aim`. Decides what PSNR to ask of the model next.

        Without a failure: the goal. Without a success: so much more as the model was wrong, and
        after repeated failures more than that. With both: half way between them.
        """
        self.model = self._prior.fit(_observations(trials))
        passed = [trial for trial in trials if self.tuned(trial.outcome)]
        failed = [trial for trial in trials if not self.tuned(trial.outcome)]
        if not failed:
            self._level_db = self._threshold_db
        elif not passed:
            wrong = max(self._predicted_db(trial) - trial.outcome.psnr_db for trial in failed)
            shortfall = self._threshold_db - failed[-1].outcome.psnr_db
            self._level_db = self._threshold_db + max(0.0, wrong) + (len(failed) - 1) * shortfall
        else:
            highest = max(self._predicted_db(trial) for trial in failed)
            lowest = min(self._predicted_db(trial) for trial in passed)
            self._level_db = (highest + lowest) / 2 if lowest > highest else lowest

    def tuned(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return outcome.psnr_db >= self._threshold_db

    def met(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return outcome.psnr_db >= self._min_psnr_db

    def close(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return 0 <= outcome.psnr_db - self._threshold_db <= self._slack_db

    def promises(self, candidate: Candidate, best: Trial) -> bool:
        """See `Aim`."""
        return candidate.seconds <= (1 - _WORTH_SPEED) * best.candidate.seconds

    def best(self, passing: Sequence[Trial]) -> Trial:
        """See `Aim`. By predicted time: measured times would make the plan depend on the day."""
        return min(passing, key=lambda trial: trial.candidate.seconds)

    def widen(self, tuned: Outcome, audited: Outcome) -> None:
        """See `Aim`."""
        self.margin_db = max(self.margin_db, tuned.psnr_db - audited.psnr_db) + _WORTH_DB

    def attainable(self, trials: Sequence[Trial]) -> str:
        """See `Aim`."""
        if not trials:
            return "no plan that is faster than dense is predicted to meet it"
        best = max(trials, key=lambda trial: trial.outcome.psnr_db)
        return f"the best plan faster than dense gave {best.outcome}"

    def _predicted_db(self, trial: Trial) -> float:
        return self.model.psnr_db(trial.candidate.attention_error, trial.candidate.cache_error)

    @property
    def _threshold_db(self) -> float:
        return self._min_psnr_db + self.margin_db


class SpeedAim:
    """The plan of highest PSNR whose measured speedup is at least `target_speedup`."""

    margin_db = 0.0

    def __init__(
        self, predictor: Predictor, model: ErrorModel, target_speedup: float, margin: float
    ) -> None:
        self.model = model
        self._predictor, self._prior = predictor, model
        self._target, self._margin = target_speedup, margin
        self._kept_promise = 1.0

    def propose(self) -> Candidate | None:
        """See `Aim`."""
        aimed = self._target * (1 + self._margin) / self._kept_promise
        allowed = self._predictor.dense_seconds / aimed
        return _if_faster(self._predictor.most_exact(self.model, allowed), self._predictor)

    def learn(self, trials: Sequence[Trial]) -> None:
        """See `Aim`. Allows less predicted time if the last plan was slower than predicted."""
        self.model = self._prior.fit(_observations(trials))
        last = trials[-1]
        promised = self._predictor.dense_seconds / last.candidate.seconds
        self._kept_promise = last.outcome.speedup / promised

    def tuned(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return outcome.speedup >= self._target

    def met(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return outcome.speedup >= self._target

    def close(self, outcome: Outcome) -> bool:
        """See `Aim`."""
        return 1 <= outcome.speedup / self._target <= 1 + 3 * self._margin

    def promises(self, candidate: Candidate, best: Trial) -> bool:
        """See `Aim`."""
        before, after = (
            self.model.psnr_db(c.attention_error, c.cache_error)
            for c in (best.candidate, candidate)
        )
        return after >= before + _WORTH_DB

    def best(self, passing: Sequence[Trial]) -> Trial:
        """See `Aim`."""
        return max(passing, key=lambda trial: trial.outcome.psnr_db)

    def widen(self, tuned: Outcome, audited: Outcome) -> None:
        """See `Aim`."""
        self._margin = max(self._margin, tuned.speedup / audited.speedup - 1) + _WORTH_SPEED

    def attainable(self, trials: Sequence[Trial]) -> str:
        """See `Aim`."""
        if trials:
            best = max(trials, key=lambda trial: trial.outcome.speedup)
            return f"the fastest plan that was sampled gave {best.outcome}"
        fastest = self._predictor.fastest(self.model, float("-inf"))
        assert fastest is not None  # any quality is allowed
        speedup = self._predictor.dense_seconds / fastest.seconds
        return f"the fastest plan of all is predicted to give {speedup:.2f}x"


def _if_faster(candidate: Candidate | None, predictor: Predictor) -> Candidate | None:
    faster = candidate is not None and candidate.seconds < predictor.dense_seconds
    return candidate if faster else None


def _observations(trials: Sequence[Trial]) -> list[Observation]:
    return [
        Observation(t.candidate.attention_error, t.candidate.cache_error, t.outcome.psnr_db)
        for t in trials
    ]
