"""Choices at the block stack: which calls run it, and what the others forecast from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ditopt.caching import CacheSchedule, draw_calls, fitted, neighbours, search_schedules
from ditopt.search.sensitivity import Alternative, Site, Technique, untouched
from ditopt.search.trajectory import COHERENCE, cache_energy, call_moves, call_worth

if TYPE_CHECKING:
    from ditopt.profiling.schema import Profile, SeedRecord


class StackChoices:
    """Cache schedules, one for each number of full calls, with their predicted time and error.

    Args:
        profile: finished, with costs.
        records: its tensors.
        cached: whether calls may be forecast; otherwise all calls are full.
    """

    def __init__(self, profile: Profile, records: Sequence[SeedRecord], *, cached: bool) -> None:
        assert profile.costs is not None
        self._profile, self._records, self._costs = profile, records, profile.costs
        self._calls = profile.sampler.calls
        gram = torch.stack([record.gram for record in records]).sum(0)
        worth = np.mean([call_worth(record) for record in records], axis=0)
        self._gram, self._drawn = gram, draw_calls(gram, steps=worth.tolist())
        self._schedules: list[CacheSchedule] = []
        if cached and float(gram.diagonal().sum()) > 0:
            # Without residuals (no block stack was found) there is nothing to forecast from.
            self._schedules = search_schedules(gram, weights=worth.tolist())
        self.site = self._site()
        self._growths: dict[tuple[Technique, tuple[int, ...], int], float] = {}

    def schedule(self, number: int) -> CacheSchedule:
        """Of an alternative of `site`; number 0 skips nothing."""
        if number == 0:
            return CacheSchedule(self._calls, tuple(range(self._calls)), {}, 0.0)
        full_calls = self.site.alternatives[number].options[0]
        return next(s for s in self._schedules if len(s.full) == full_calls)

    def schedules(self, full_calls: int) -> Iterator[CacheSchedule]:
        """Schedules with so many full calls: what rules choose, then neighbours of theirs."""
        first = [s for s in self._schedules if len(s.full) == full_calls]
        known = {schedule.full for schedule in first}
        drawn = [
            *first,
            *(fitted(self._gram, f) for f in self._drawn[full_calls] if f not in known),
        ]
        yield from drawn
        known |= {schedule.full for schedule in drawn}
        for schedule in drawn:
            for full in neighbours(self._gram, schedule):
                if full not in known:
                    known.add(full)
                    yield fitted(self._gram, full)

    def adopt(self, schedule: CacheSchedule) -> None:
        """From now on this is the schedule with so many full calls."""
        count = len(schedule.full)
        self._schedules = [schedule if len(s.full) == count else s for s in self._schedules]
        self.site = self._site()

    def energy(self, schedule: CacheSchedule) -> float:
        """What a schedule's forecasts put wrong into the trajectory, mean over the records."""
        return float(np.mean([cache_energy(record, schedule) for record in self._records]))

    def growth(self, technique: Technique, schedule: CacheSchedule, first: int) -> float:
        """How much more errors from a call on are worth with a schedule than without one."""
        key = (technique, schedule.full, first)
        if key not in self._growths:
            self._growths[key] = self._worth(technique, first, schedule) / self._worth(
                technique, first
            )
        return self._growths[key]

    def _site(self) -> Site:
        """One alternative for each schedule, with the time of all its calls."""
        full_ms, skip_ms = self._costs.dense_call_ms, self._costs.skip_call_ms
        alternatives = [untouched(1, self._calls * full_ms)]
        for schedule in self._schedules:
            if schedule.rows:
                full, rows = len(schedule.full), schedule.rows.values()
                alternatives.append(
                    Alternative(
                        name=f"{full} full calls",
                        fixed_ms=full * full_ms + (self._calls - full) * skip_ms,
                        bytes=max(map(len, rows)) * self._profile.residual_bytes,
                        option_ms=np.zeros(1),
                        error=np.array([[self.energy(schedule)]]),
                        options=(full,),
                    )
                )
        return Site("block stack", "cache", 0, tuple(alternatives))

    def _worth(
        self, technique: Technique, first: int, schedule: CacheSchedule | None = None
    ) -> float:
        """Energy of the same relative error at every call."""
        moves = [call_moves(record, first, schedule) for record in self._records]
        alone = sum(float(move @ move) for move in moves)
        if technique != "attention":
            return alone
        return COHERENCE * sum(float(move.sum()) ** 2 for move in moves) + (1 - COHERENCE) * alone
