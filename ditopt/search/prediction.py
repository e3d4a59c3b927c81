"""Joint choices of cache schedule, attention, formats: predicted time, error, memory, quality."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ditopt.caching import CacheSchedule
from ditopt.errors import ProfileError
from ditopt.search.assignment import Assignment, Limits, Objective, evaluate, solve
from ditopt.search.attention import AttentionChoices
from ditopt.search.calibration import Energies
from ditopt.search.lagrangian import relaxed
from ditopt.search.sensitivity import TECHNIQUES, Site, Technique
from ditopt.search.stack import StackChoices

if TYPE_CHECKING:
    from ditopt.plan import Plan
    from ditopt.profiling.schema import Profile, SeedRecord
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.linears import LinearChoices
    from ditopt.search.sensitivity import Floats

_DENSE_SHARES = (0.2, 0.1, 0.3)
"""Shares of the calls, at the start, that may keep dense attention: the scene is laid out there.
The first is what is taken where the profile says nothing about early calls."""

_FINALISTS = 2
"""Combinations of schedule, start and order for which the assignment is solved in full."""

_PRICES = 96


@dataclass(frozen=True)
class Candidate:
    """One joint choice.

    Attributes:
        schedule: which calls are full, and the forecasts of the others.
        start: first call with sparse attention.
        order: number of the profile's token order.
        assignment: what sites choose; its times are of one loop, its errors with gains.
        energies: that each technique adds.
        seconds: predicted time of one loop.
        bytes: weights and stored residuals.
    """

    schedule: CacheSchedule
    start: int
    order: int
    assignment: Assignment
    energies: Energies
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _Frame:
    """A cache schedule, a dense start and an order: what is fixed before sites choose."""

    schedule: int
    start: int
    order: int


class Predictor:
    """Everything that the search knows before it samples.

    Args:
        profile: finished.
        records: its tensors.
        linears: choices at the linear layers, where they were profiled.
        techniques: those that may be used; the others leave the model as it is.
        max_programs: bound on the number of different block programs.
    """

    def __init__(
        self,
        profile: Profile,
        records: Sequence[SeedRecord],
        linears: LinearChoices | None = None,
        techniques: Collection[Technique] = TECHNIQUES,
        max_programs: int | None = 4,
    ) -> None:
        assert profile.costs is not None
        self.profile, self._records, self._costs = profile, records, profile.costs
        self.linears = linears
        self.attention = AttentionChoices(profile, records)
        self._techniques, self._max_programs = frozenset(techniques), max_programs
        self._calls = profile.sampler.calls
        self._sites: dict[tuple[int, int, tuple[int, ...] | None], list[Site]] = {}
        parts_ms = self.attention.dense_ms + (linears.plain_ms if linears is not None else 0.0)
        self._share = min(1.0, self._costs.dense_call_ms / parts_ms) if parts_ms else 1.0
        self.stack = StackChoices(profile, records, cached="cache" in techniques)
        self._relaxed: dict[object, tuple[Floats, Floats]] = {}

    @property
    def starts(self) -> list[int]:
        """Calls from which on attention may be sparse: only such as the profile knows about."""
        usual = [min(self._calls, math.ceil(share * self._calls)) for share in _DENSE_SHARES]
        seen = [call for call in self.profile.observed_calls if 0 < call < usual[0]]
        allowed = {usual[0], *(s for s in usual[1:] if s > usual[0] or seen)}
        return sorted(start for start in allowed if start < self._calls) or [self._calls]

    @property
    def dense_seconds(self) -> float:
        """Time of one dense loop."""
        return self._calls * self.profile.sampler.branches * self._costs.dense_call_ms / 1e3

    @property
    def least_bytes(self) -> int:
        """Weights in their smallest formats."""
        saved = sum(
            site.alternatives[0].bytes - min(a.bytes for a in site.alternatives)
            for site in self.sites(self.starts[0], 0)
        )
        return self.dense_bytes - saved

    @property
    def dense_bytes(self) -> int:
        """Weights of the model as it is."""
        known = self.linears.plain_bytes if self.linears is not None else 0
        return max(known, self.profile.weight_bytes)

    def fastest(
        self,
        model: ErrorModel,
        min_psnr_db: float,
        max_bytes: float = math.inf,
        *,
        roughly: bool = False,
    ) -> Candidate | None:
        """The fastest candidate whose predicted PSNR is at least `min_psnr_db`, or None.

        `roughly`: the most promising frame only, and without closing the gap of its assignment.
        """
        error = model.budget(min_psnr_db)
        ranked = self._scan(model, error=error, max_bytes=max_bytes)
        limits = Limits(error=error, bytes=max_bytes, programs=self._max_programs)
        found = [
            self._solved(frame, model, limits, close_gap=not roughly)
            for frame in (ranked[:1] if roughly else ranked)
        ]
        return min((c for c in found if c), key=lambda c: c.seconds, default=None)

    def most_exact(
        self, model: ErrorModel, max_seconds: float, max_bytes: float = math.inf
    ) -> Candidate | None:
        """The candidate of highest predicted PSNR within a time and a memory, or None."""
        ranked = self._scan(model, seconds=max_seconds, max_bytes=max_bytes)
        limits = Limits(max_seconds * 1e3, math.inf, max_bytes, self._max_programs)
        found = [self._solved(frame, model, limits) for frame in ranked]
        return max((c for c in found if c), key=lambda c: model.psnr_db(c.energies), default=None)

    def energies(self, plan: Plan) -> Energies:
        """What a plan puts wrong into the trajectory, by the profile.

        Raises:
            ProfileError: the plan chooses what the profile has not measured.
        """
        if any(phase.selectors for phase in plan.phases):
            raise ProfileError("selectors choose blocks from the data: no error was measured")
        schedule, cache = None, 0.0
        if plan.cache is not None:
            schedule = CacheSchedule(self._calls, plan.cache.full, plan.cache.coefficients)
            cache = self.stack.energy(schedule)
        linears = self.linears.energy(plan, schedule) if self.linears is not None else 0.0
        return Energies(self.attention.energy(plan, schedule), linears, cache)

    def sites(self, start: int, order: int, schedule: CacheSchedule | None = None) -> list[Site]:
        """What sites may choose; times are of one call, errors without gains.

        Parts were timed alone; where they add up to more than the whole call, all are that much
        faster in it.
        """
        calls = schedule.full if schedule is not None and schedule.rows else None
        key = (start, order, calls)
        if key not in self._sites:
            made = []
            if "attention" in self._techniques:
                made += self.attention.sites(order, start, schedule)
            if self.linears is not None and "linears" in self._techniques:
                made += self.linears.sites(schedule)
            self._sites[key] = [site.in_time(self._share) for site in made]
        return self._sites[key]

    def _full(self, frame: _Frame) -> dict[Technique, int]:
        """For each technique, full calls in which its choice runs."""
        full = self.stack.schedule(frame.schedule).full
        return {"attention": sum(call >= frame.start for call in full), "linears": len(full)}

    def _scan(
        self,
        model: ErrorModel,
        *,
        error: float = math.inf,
        seconds: float = math.inf,
        max_bytes: float = math.inf,
    ) -> list[_Frame]:
        """The most promising frames, by the bound that free choices at one price give."""
        orders = self.attention.orders if "attention" in self._techniques else [0]
        prices = np.append(np.inf, np.geomspace(1e12, 1e-6, _PRICES))
        ranked = []
        for number, stack in enumerate(self.stack.site.alternatives):
            for start in self.starts:
                for order in orders:
                    frame = _Frame(number, start, order)
                    ms, energy = self._bound(frame, model, prices)
                    ms = ms + stack.fixed_ms
                    energy = energy + model.gains.cache * float(stack.error.sum())
                    ms = ms * self.profile.sampler.branches
                    goal, limited, limit = (
                        (ms, energy, error) if math.isfinite(error) else (energy, ms, seconds * 1e3)
                    )
                    inside = limited <= limit * (1 + 1e-9)
                    if inside.any() and stack.bytes <= max_bytes:
                        ranked.append((float(goal[inside].min()), number, start, order))
        ranked.sort()
        return [_Frame(*frame) for _, *frame in ranked[:_FINALISTS]]

    def _bound(self, frame: _Frame, model: ErrorModel, prices: Floats) -> tuple[Floats, Floats]:
        """Milliseconds added to a loop and gained energy [L] when all sites choose at one price."""
        sites, schedule = self.sites(frame.start, frame.order), self.stack.schedule(frame.schedule)
        ms, energy = np.zeros(len(prices)), np.zeros(len(prices))
        for technique, calls in self._full(frame).items():
            mine = [site for site in sites if site.technique == technique]
            if not mine or not calls:
                continue
            first = frame.start if technique == "attention" else 0
            gain = getattr(model.gains, technique) * self.stack.growth(technique, schedule, first)
            key = (technique, frame.start, frame.order) if technique == "attention" else technique
            if key not in self._relaxed:
                self._relaxed[key] = relaxed(mine, prices[1:])
            # A price of gained energy in ms of a loop is one of plain energy in ms of a call.
            here = np.searchsorted(-prices[1:], -prices * gain / calls).clip(max=len(prices) - 2)
            as_is = sum(site.alternatives[0].fixed_ms for site in mine)
            relaxed_ms, relaxed_energy = (part[here] for part in self._relaxed[key])
            ms += np.where(np.isinf(prices), 0.0, calls * (relaxed_ms - as_is))
            energy += np.where(np.isinf(prices), 0.0, gain * relaxed_energy)
        return ms, energy

    def _solved(
        self, frame: _Frame, model: ErrorModel, limits: Limits, *, close_gap: bool = True
    ) -> Candidate | None:
        """The best assignment of sites within one frame; `limits` are those of a whole loop."""
        stack = self.stack.site.alternatives[frame.schedule]
        full = self._full(frame)
        scaled = [
            site.scaled(full[site.technique], getattr(model.gains, site.technique))
            for site in self._frame_sites(frame)
            if full[site.technique]
        ]
        as_is = evaluate(scaled, {})
        rest = Limits(
            ms=limits.ms / self.profile.sampler.branches - stack.fixed_ms + as_is.ms,
            error=limits.error - model.gains.cache * float(stack.error.sum()),
            bytes=limits.bytes - stack.bytes - self.dense_bytes + as_is.bytes,
            programs=limits.programs,
        )
        if min(rest.ms, rest.error, rest.bytes) < 0:
            return None
        minimize: Objective = "ms" if math.isfinite(limits.error) else "error"
        found = solve(scaled, minimize, rest, close_gap=close_gap)
        return None if found is None else self._candidate(frame, found, as_is)

    def _frame_sites(self, frame: _Frame) -> list[Site]:
        return self.sites(frame.start, frame.order, self.stack.schedule(frame.schedule))

    def _candidate(self, frame: _Frame, found: Assignment, as_is: Assignment) -> Candidate:
        stack = self.stack.site.alternatives[frame.schedule]
        raw = dict.fromkeys(("attention", "linears"), 0.0)
        for site in self._frame_sites(frame):
            raw[site.technique] += site.cost(found.choices.get(site.id, site.as_is))[1]
        ms = stack.fixed_ms + found.ms - as_is.ms
        return Candidate(
            schedule=self.stack.schedule(frame.schedule),
            start=frame.start,
            order=frame.order,
            assignment=found,
            energies=Energies(raw["attention"], raw["linears"], float(stack.error.sum())),
            seconds=ms * self.profile.sampler.branches / 1e3,
            bytes=self.dense_bytes + found.bytes - as_is.bytes + stack.bytes,
        )
