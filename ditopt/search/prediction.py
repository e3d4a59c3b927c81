"""Joint choices of cache schedule and attention patterns: predicted time, error and quality."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ditopt.caching import CacheSchedule, draw_calls, fitted, forced_calls, neighbours
from ditopt.patterns import HeadPattern, density
from ditopt.plan import Goal, Phase, Plan, Predicted
from ditopt.search.assignment import Assignment, evaluate, frontier, solve
from ditopt.search.exchange import cache_section
from ditopt.search.problem import plain_options, site_options

if TYPE_CHECKING:
    from ditopt.profiling.schema import Profile, SeedRecord
    from ditopt.quantization import LinearRule
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.linears import LinearChoices

_DENSE_SHARE = 0.2
"""Share of the calls, at the start, that keep dense attention: the scene is laid out there."""


@dataclass(frozen=True)
class Candidate:
    """One joint choice.

    Attributes:
        schedule: which calls are full, and the forecasts of the others.
        assignment: attention patterns of full calls after the dense ones.
        attention_error: energy that attention adds, in units of the sampled tensor squared.
        cache_error: the same of the forecasts.
        seconds: predicted time of one loop.
    """

    schedule: CacheSchedule
    assignment: Assignment
    attention_error: float
    cache_error: float
    seconds: float


class Predictor:
    """Everything that the search knows before it samples."""

    def __init__(
        self,
        profile: Profile,
        records: Sequence[SeedRecord],
        linears: LinearChoices | None = None,
    ) -> None:
        assert profile.costs is not None
        self._linears = linears
        self._profile = profile
        self._costs = profile.costs
        self._branches = profile.sampler.branches
        self._calls = profile.sampler.calls
        self.dense_calls = min(self._calls, math.ceil(_DENSE_SHARE * self._calls))
        self._sites = site_options(profile, records, self.dense_calls)
        if linears is not None:
            self._sites += linears.options(records, self.dense_calls)
        self._dense_attention_ms = sum(site.dense_ms for site in self._sites)
        self._frontier = frontier(self._sites)
        gram = torch.stack([record.gram for record in records]).sum(0)
        hidden = torch.stack([record.hidden_energy for record in records]).sum(0)
        steps = torch.stack([record.step_energy for record in records]).mean(0)
        residual = gram.diagonal()
        # A forecast that errs by the whole hidden state spoils the whole step.
        self._cache_scale = float((steps / hidden.clamp(min=1e-30)) @ residual)
        self._gram, self._choices = gram, draw_calls(gram, steps=steps.tolist())
        fewest = len(forced_calls(self._calls))
        self._schedules = [
            fitted(gram, self._choices[k][0]) for k in range(fewest, self._calls + 1)
        ]
        if self._cache_scale <= 0:
            # Without residuals (no block stack was found) there is nothing to forecast from.
            self._schedules = self._schedules[-1:]

    def schedules(self, full_calls: int) -> Iterator[CacheSchedule]:
        """Schedules with so many full calls: what other rules choose, then neighbours of theirs."""
        drawn = [fitted(self._gram, full) for full in self._choices[full_calls]]
        yield from drawn
        known = {schedule.full for schedule in drawn}
        for schedule in drawn:
            for full in neighbours(self._gram, schedule):
                if full not in known:
                    known.add(full)
                    yield fitted(self._gram, full)

    def adopt(self, schedule: CacheSchedule) -> None:
        """From now on this is the schedule with so many full calls."""
        count = len(schedule.full)
        self._schedules = [schedule if len(s.full) == count else s for s in self._schedules]

    @property
    def dense_seconds(self) -> float:
        """Time of one dense loop."""
        return self._calls * self._branches * self._costs.dense_call_ms / 1e3

    @property
    def dense(self) -> Candidate:
        """Nothing skipped, nothing sparse."""
        return self._candidate(self._schedules[-1], evaluate(self._sites, {}))

    def fastest(self, model: ErrorModel, min_psnr_db: float) -> Candidate | None:
        """The fastest candidate whose predicted PSNR is at least `min_psnr_db`, or None."""
        best: Candidate | None = None
        for schedule in self._schedules:
            budget = model.attention_budget(min_psnr_db, self._cache_error(schedule))
            allowed = [point for point in self._frontier if point.error <= budget]
            if allowed:
                fastest = min(allowed, key=lambda point: point.ms)
                best = _faster(best, self._candidate(schedule, fastest))
        if best is None:
            return None
        budget = model.attention_budget(min_psnr_db, best.cache_error)
        exact = solve(self._sites, "ms", budget)
        return best if exact is None else _faster(best, self._candidate(best.schedule, exact))

    def most_exact(self, model: ErrorModel, max_seconds: float) -> Candidate | None:
        """The candidate of highest predicted PSNR that takes at most `max_seconds`, or None."""
        best: Candidate | None = None
        for schedule in self._schedules:
            allowed_ms = self._attention_budget_ms(schedule, max_seconds)
            for point in self._frontier:  # from the most exact on
                if point.ms <= allowed_ms:
                    best = _better(model, best, self._candidate(schedule, point))
                    break
        if best is None:
            return None
        allowed_ms = self._attention_budget_ms(best.schedule, max_seconds)
        exact = solve(self._sites, "error", allowed_ms)
        return (
            best if exact is None else _better(model, best, self._candidate(best.schedule, exact))
        )

    def plan(self, candidate: Candidate, model: ErrorModel, goal: Goal) -> Plan:
        """The candidate as a plan, not verified yet."""
        profile, schedule = self._profile, candidate.schedule
        offered = plain_options(profile)
        rules = {
            site: tuple(offered[option].pattern for option in options)
            for site, options in candidate.assignment.options.items()
            if site in profile.shapes
        }
        linear: dict[str, LinearRule] = {}
        model_record = profile.model
        if self._linears is not None:
            linear = self._linears.rules(candidate.assignment.options)
            records = self._linears.profile.records
            model_record = profile.model.model_copy(update={"linears": records})
        ranges = [(0, self.dense_calls), (self.dense_calls, self._calls)]
        phases = [Phase(calls=ranges[0]), Phase(calls=ranges[1], attention=rules, linear=linear)]
        psnr_db = model.psnr_db(candidate.attention_error, candidate.cache_error)
        plan = Plan(
            model=model_record,
            sampler=profile.sampler,
            hardware=profile.hardware,
            goal=goal,
            layout=profile.layout,
            block=profile.block,
            phases=tuple(phases) if rules or linear else (Phase(calls=(0, self._calls)),),
            cache=cache_section(schedule),
            predicted=Predicted(
                seconds=candidate.seconds,
                speedup=self.dense_seconds / candidate.seconds,
                psnr_db=None if math.isinf(psnr_db) else psnr_db,
                density=self._mean_density(rules),
            ),
        )
        tensors = self._linears.tensors(linear) if self._linears is not None else {}
        return plan.with_tensors(tensors) if tensors else plan

    def _candidate(self, schedule: CacheSchedule, assignment: Assignment) -> Candidate:
        full_ms, skip_ms = self._costs.dense_call_ms, self._costs.skip_call_ms
        skipped = self._calls - len(schedule.full)
        saved_ms = self._dense_attention_ms - assignment.ms
        ms = len(schedule.full) * full_ms + skipped * skip_ms - self._sparse(schedule) * saved_ms
        return Candidate(
            schedule=schedule,
            assignment=assignment,
            attention_error=assignment.error,
            cache_error=self._cache_error(schedule),
            seconds=ms * self._branches / 1e3,
        )

    def _attention_budget_ms(self, schedule: CacheSchedule, max_seconds: float) -> float:
        """Attention time that one sparse call may take."""
        dense = self._candidate(schedule, evaluate(self._sites, {}))
        saving_ms = (dense.seconds - max_seconds) * 1e3 / self._branches
        return self._dense_attention_ms - saving_ms / max(1, self._sparse(schedule))

    def _sparse(self, schedule: CacheSchedule) -> int:
        """Full calls after the dense ones."""
        return sum(call >= self.dense_calls for call in schedule.full)

    def _cache_error(self, schedule: CacheSchedule) -> float:
        return (schedule.error or 0.0) * self._cache_scale

    def _mean_density(self, rules: dict[str, tuple[HeadPattern, ...]]) -> float:
        profile, kept = self._profile, []
        for site, shape in profile.shapes.items():
            sizes = (shape.tokens, shape.tokens, profile.block.q, profile.block.k)
            patterns = rules.get(site)
            if patterns is None:
                kept += [1.0] * shape.heads
            else:
                kept += [density(pattern, profile.layout, *sizes) for pattern in patterns]
        return sum(kept) / len(kept) if kept else 1.0


def _faster(best: Candidate | None, other: Candidate) -> Candidate:
    return other if best is None or other.seconds < best.seconds else best


def _better(model: ErrorModel, best: Candidate | None, other: Candidate) -> Candidate:
    if best is None:
        return other
    before, after = (model.psnr_db(c.attention_error, c.cache_error) for c in (best, other))
    return other if after > before else best
