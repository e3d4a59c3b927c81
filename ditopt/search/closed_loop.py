"""Propose, sample, correct: until the tune seeds meet the goal, and then fresh seeds do.

Tune seeds are looked at again and again, so meeting the goal on them proves nothing: audit seeds
are drawn once the plan is fixed. An audit that fails, or that is better than it has to be, shifts
what is asked of the tune seeds and draws others; the plan records them all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ditopt.errors import GoalUnattainable
from ditopt.plan import Goal, Plan, Verification
from ditopt.search.aims import Aim, Outcome, Trial
from ditopt.search.plans import plan_of
from ditopt.search.quality_aim import QualityAim
from ditopt.search.record import Trial as TrialRecord
from ditopt.search.speed_aim import SpeedAim
from ditopt.search.tuning import SampleSchedule, ScheduleTuner

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.progress import Progress
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Candidate, Predictor
    from ditopt.search.verify import Measured, Verify

TUNE_SEED, AUDIT_SEED, AUDIT_STRIDE = 1000, 2000, 100
"""First seeds; profiles use 0, 1, ... and each further audit starts a stride later."""

_SHOWN = 4
"""Results of audits that are kept for a report."""


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


@dataclass(frozen=True)
class _Sampled:
    """One measurement of a plan."""

    plan: Plan
    purpose: Literal["tune", "audit"]
    seeds: tuple[int, ...]
    measured: tuple[Measured, ...]
    outcome: Outcome
    margin_db: float
    passed: bool


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
        quality = goal.min_psnr_db is not None or goal.min_ssim is not None
        self._aim: Aim = (
            QualityAim(predictor, model, goal, spec.margin_db, spec.slack_db)
            if quality
            else SpeedAim(predictor, model, goal, spec.speed_margin)
        )
        self.tuner: ScheduleTuner | None = None
        if sample_schedule is not None:
            seeds = range(TUNE_SEED, TUNE_SEED + spec.tune_seeds)
            self.tuner = ScheduleTuner(
                predictor.stack, sample_schedule, seeds, spec.schedule_samples
            )
        self._trials: list[Trial] = []
        self._sampled: list[_Sampled] = []
        self._results: dict[int, dict[int, Tensor]] = {}
        self._adopted: Trial | None = None

    def run(self) -> Plan:
        """The best plan found that passed an audit, with every measurement recorded.

        Raises:
            GoalUnattainable: nothing passed; the message states the best that was found.
        """
        for number in range(self._spec.max_audits):
            trial = self._tune()
            if trial is self._adopted:
                break
            first = AUDIT_SEED + AUDIT_STRIDE * number
            seeds = range(first, first + self._spec.audit_seeds)
            outcome = self._sample(trial.plan, "audit", seeds)
            if self._aim.met(outcome):
                self._adopted = trial
                if not self._aim.exceeds(outcome):
                    break
            elif self._adopted is not None:
                break  # what was adopted before is the fastest plan that passes
            self._aim.shift(trial.outcome, outcome)
            self._aim.learn(self._trials)
        if self._adopted is None:
            raise self._unattainable(f"{self._spec.max_audits} audits on fresh seeds failed")
        verification = tuple(self._verification(sampled) for sampled in self._sampled)
        return self._adopted.plan.model_copy(update={"verification": verification})

    @property
    def model(self) -> ErrorModel:
        """The error model as the last measurement left it."""
        return self._aim.model

    @property
    def results(self) -> dict[int, Tensor]:
        """Results of the adopted plan on the first of its audit seeds."""
        return {} if self._adopted is None else self._results.get(id(self._adopted.plan), {})

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """Everything that was sampled, in order."""
        return tuple(self._trial(sampled) for sampled in self._sampled)

    def _tune(self) -> Trial:
        """The best trial that passes on the tune seeds."""
        seeds = range(TUNE_SEED, TUNE_SEED + self._spec.tune_seeds)
        for _ in range(self._spec.max_tunes):
            candidate = self._next()
            if candidate is None:
                break
            plan = plan_of(candidate, self._predictor, self._aim.model, self._goal)
            trial = Trial(candidate, plan, self._sample(plan, "tune", seeds))
            self._trials.append(trial)
            self._aim.learn(self._trials)
            if self._aim.close(trial.outcome):
                break
        best = self._best_passing()
        if best is None:
            raise self._unattainable(f"{len(self._trials)} plans were sampled")
        return best

    def _next(self) -> Candidate | None:
        """What to sample next, or None where nothing is worth it."""
        candidate, best = self._propose(), self._best_passing()
        fresh = candidate is not None and not self._known(candidate)
        if candidate is not None and fresh and (not best or self._aim.promises(candidate, best)):
            return candidate
        if best is None or self._aim.close(best.outcome):
            return None
        # Better than it has to be: a faster plan must have failed, or be tried.
        faster = [t for t in self._trials if t.candidate.seconds < best.candidate.seconds]
        if faster:
            return None
        cheaper = self._aim.next_cheaper(best)
        return None if cheaper is None or self._known(cheaper) else cheaper

    def _known(self, candidate: Candidate) -> bool:
        return any(trial.candidate == candidate for trial in self._trials)

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
            ssim=statistics.fmean(m.ssim for m in measured),
        )
        if purpose == "audit":
            shown = list(zip(seeds, measured, strict=True))[:_SHOWN]
            self._results[id(plan)] = {s: m.result for s, m in shown if m.result is not None}
        passed = self._aim.tuned(outcome) if purpose == "tune" else self._aim.met(outcome)
        margin_db = self._aim.margin_db
        slim = tuple(m.without_result() for m in measured)
        self._sampled.append(
            _Sampled(plan, purpose, tuple(seeds), slim, outcome, margin_db, passed)
        )
        done, expected = len(self._sampled), self._spec.max_tunes + 1
        self._progress("plan", done, max(done, expected))
        return outcome

    def _is_adopted(self, sampled: _Sampled) -> bool:
        return self._adopted is not None and sampled.plan is self._adopted.plan

    def _verification(self, sampled: _Sampled) -> Verification:
        decibels = tuple(m.psnr_db for m in sampled.measured)
        outcome = sampled.outcome
        return Verification(
            purpose=sampled.purpose,
            seeds=sampled.seeds,
            psnr_db=decibels,
            mean_psnr_db=outcome.psnr_db,
            min_psnr_db=min(decibels),
            p10_psnr_db=float(np.percentile(decibels, 10)),
            mean_ssim=None if math.isnan(outcome.ssim) else outcome.ssim,
            # Where no speed was asked for, times would only make equal plans differ.
            speedup=None if self._goal.target_speedup is None else round(outcome.speedup, 2),
            margin_db=sampled.margin_db,
            passed=sampled.passed,
            adopted=self._is_adopted(sampled),
        )

    def _trial(self, sampled: _Sampled) -> TrialRecord:
        predicted, cache = sampled.plan.predicted, sampled.plan.cache
        assert predicted is not None
        measured = sampled.measured
        return TrialRecord(
            purpose=sampled.purpose,
            seeds=sampled.seeds,
            predicted_psnr_db=predicted.psnr_db,
            measured_psnr_db=tuple(m.psnr_db for m in measured),
            measured_ssim=tuple(m.ssim for m in measured if not math.isnan(m.ssim)),
            predicted_seconds=predicted.seconds,
            predicted_speedup=predicted.speedup,
            measured_seconds=statistics.median(m.seconds for m in measured),
            full_calls=len(cache.full) if cache else sampled.plan.sampler.calls,
            density=predicted.density,
            adopted=self._is_adopted(sampled),
        )

    def _unattainable(self, reason: str) -> GoalUnattainable:
        return GoalUnattainable(
            f"no plan meets {self._goal}: {reason}; {self._aim.attainable(self._trials)}",
            remedy="Ask for less, or profile more seeds.",
        )
