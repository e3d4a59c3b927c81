"""What a goal means to the search: what to sample next, and what a measurement teaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ditopt.search.calibration import ErrorModel, Observation

if TYPE_CHECKING:
    from ditopt.plan import Goal, Plan
    from ditopt.search.prediction import Candidate, Predictor


_CAREFUL = 0.97
"""Share of the dense time that the most careful plan worth having takes."""


_WORTH_SPEED, _WORTH_DB = 0.02, 0.25
"""Differences that are worth a measurement; smaller ones cost more than they bring."""

_CHEAPER_DB = tuple(0.5 * 1.5**k for k in range(11))
"""Drops of predicted PSNR, up to 29 dB, in which the next cheaper plan is looked for."""


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
            shortfall = max(_WORTH_DB, self.margin_db - self._surplus_db(failed[-1].outcome))
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
        return candidate.seconds <= (1 - _WORTH_SPEED) * best.candidate.seconds

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
            self.margin_db = max(self.margin_db, behind) + _WORTH_DB

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
        return after >= before + _WORTH_DB

    def best(self, passing: Sequence[Trial]) -> Trial:
        """See `Aim`."""
        return max(passing, key=lambda trial: trial.outcome.psnr_db)

    def exceeds(self, outcome: Outcome) -> bool:
        """See `Aim`. More speed than asked for is not waste."""
        return False

    def shift(self, tuned: Outcome, audited: Outcome) -> None:
        """See `Aim`."""
        self._margin = max(self._margin, tuned.speedup / audited.speedup - 1) + _WORTH_SPEED

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


def aim_of(
    goal: Goal,
    predictor: Predictor,
    model: ErrorModel,
    *,
    margin_db: float,
    slack_db: float,
    speed_margin: float,
) -> Aim:
    """Least time where a quality is asked for, else highest quality."""
    if goal.min_psnr_db is not None or goal.min_ssim is not None:
        return QualityAim(predictor, model, goal, margin_db, slack_db)
    return SpeedAim(predictor, model, goal, speed_margin)


def observations(trials: Sequence[Trial]) -> list[Observation]:
    """What trials teach the error model."""
    return [Observation(t.candidate.energies, t.outcome.psnr_db, t.outcome.ssim) for t in trials]
