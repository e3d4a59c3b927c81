"""Propose, sample, correct: until the tune seeds meet the goal, and then fresh seeds do.

Tune seeds are looked at again and again, so meeting the goal on them proves nothing: audit seeds
are drawn once the plan is fixed. A failed audit widens the margin and draws others; the plan
records them all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ditopt.errors import GoalUnattainable
from ditopt.plan import Goal, Plan, Verification
from ditopt.search.aims import Aim, Outcome, QualityAim, SpeedAim, Trial
from ditopt.search.tuning import SampleSchedule, ScheduleTuner

if TYPE_CHECKING:
    from ditopt.progress import Progress
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Candidate, Predictor
    from ditopt.search.verify import Verify

TUNE_SEED, AUDIT_SEED, AUDIT_STRIDE = 1000, 2000, 100
"""First seeds; profiles use 0, 1, ... and each further audit starts a stride later."""


@dataclass(frozen=True)
class LoopSpec:
    """How much sampling the search may do.

    Attributes:
        tune_seeds: seeds of each tune measurement.
        audit_seeds: seeds of each audit.
        max_tunes: tune measurements before each audit.
        max_audits: audits before the search gives up.
        margin_db: how far above a PSNR goal the tune mean must lie.
        slack_db: overshoot at which a faster plan is no longer looked for.
        speed_margin: how far above a speed goal to aim, as a fraction.
        schedule_samples: samples, one seed each, that choose among cache schedules.
    """

    tune_seeds: int = 2
    audit_seeds: int = 3
    max_tunes: int = 6
    max_audits: int = 3
    margin_db: float = 0.3
    slack_db: float = 1.5
    speed_margin: float = 0.03
    schedule_samples: int = 8


class ClosedLoop:
    """One search for one goal."""

    def __init__(
        self,
        predictor: Predictor,
        model: ErrorModel,
        goal: Goal,
        verify: Verify,
        progress: Progress,
        spec: LoopSpec,
        sample_schedule: SampleSchedule | None = None,
    ) -> None:
        self._predictor, self._goal, self._spec = predictor, goal, spec
        self._verify, self._progress = verify, progress
        self._aim: Aim
        if goal.min_psnr_db is not None:
            self._aim = QualityAim(
                predictor, model, goal.min_psnr_db, spec.margin_db, spec.slack_db
            )
        else:
            assert goal.target_speedup is not None
            self._aim = SpeedAim(predictor, model, goal.target_speedup, spec.speed_margin)
        self.tuner: ScheduleTuner | None = None
        if sample_schedule is not None:
            seeds = range(TUNE_SEED, TUNE_SEED + spec.tune_seeds)
            self.tuner = ScheduleTuner(predictor, sample_schedule, seeds, spec.schedule_samples)
        self._trials: list[Trial] = []
        self._records: list[tuple[Plan, Verification]] = []

    def run(self) -> Plan:
        """The best plan found that passed an audit, with every measurement recorded.

        Raises:
            GoalUnattainable: nothing passed; the message states the best that was found.
        """
        for number in range(self._spec.max_audits):
            trial = self._tune()
            first = AUDIT_SEED + AUDIT_STRIDE * number
            seeds = range(first, first + self._spec.audit_seeds)
            outcome = self._sample(trial.plan, "audit", seeds)
            if self._aim.met(outcome):
                return self._finish(trial)
            self._aim.widen(trial.outcome, outcome)
            self._aim.learn(self._trials)
        raise self._unattainable(f"{self._spec.max_audits} audits on fresh seeds failed")

    def _tune(self) -> Trial:
        """The best trial that passes on the tune seeds."""
        seeds = range(TUNE_SEED, TUNE_SEED + self._spec.tune_seeds)
        for _ in range(self._spec.max_tunes):
            candidate = self._propose()
            if candidate is None or any(t.candidate == candidate for t in self._trials):
                break
            best = self._best_passing()
            if best is not None and not self._aim.promises(candidate, best):
                break
            plan = self._predictor.plan(candidate, self._aim.model, self._goal)
            trial = Trial(candidate, plan, self._sample(plan, "tune", seeds))
            self._trials.append(trial)
            self._aim.learn(self._trials)
            if self._aim.close(trial.outcome):
                break
        best = self._best_passing()
        if best is None:
            raise self._unattainable(f"{len(self._trials)} plans were sampled")
        return best

    def _propose(self) -> Candidate | None:
        """The aim's proposal, once sampling has chosen among schedules with as many full calls."""
        candidate = self._aim.propose()
        if candidate is not None and self.tuner is not None and self.tuner.tune(candidate.schedule):
            return self._aim.propose()
        return candidate

    def _best_passing(self) -> Trial | None:
        passing = [trial for trial in self._trials if self._aim.tuned(trial.outcome)]
        return self._aim.best(passing) if passing else None

    def _sample(
        self, plan: Plan, purpose: Literal["tune", "audit"], seeds: Sequence[int]
    ) -> Outcome:
        measured = self._verify(plan, seeds)
        outcome = Outcome(
            psnr_db=statistics.fmean(m.psnr_db for m in measured),
            speedup=self._predictor.dense_seconds / statistics.median(m.seconds for m in measured),
        )
        verification = Verification(
            purpose=purpose,
            seeds=tuple(seeds),
            psnr_db=tuple(m.psnr_db for m in measured),
            mean_psnr_db=outcome.psnr_db,
            # Where no speed was asked for, times would only make equal plans differ.
            speedup=None if self._goal.target_speedup is None else round(outcome.speedup, 2),
            margin_db=self._aim.margin_db,
            passed=self._aim.tuned(outcome) if purpose == "tune" else self._aim.met(outcome),
            adopted=False,
        )
        self._records.append((plan, verification))
        done, expected = len(self._records), self._spec.max_tunes + 1
        self._progress("plan", done, max(done, expected))
        return outcome

    def _finish(self, trial: Trial) -> Plan:
        records = tuple(
            record.model_copy(update={"adopted": plan is trial.plan})
            for plan, record in self._records
        )
        return trial.plan.model_copy(update={"verification": records})

    def _unattainable(self, reason: str) -> GoalUnattainable:
        return GoalUnattainable(
            f"no plan meets {self._goal}: {reason}; {self._aim.attainable(self._trials)}",
            remedy="Ask for less, or profile more seeds.",
        )
