"""`ScheduleTuner`: real samples choose among cache schedules with equally many full calls.

The recording ranks schedules only roughly, and sampling a few seeds misleads, too: seeds differ by
several dB. So the recording's first choice stays unless another is better by more than the standard
error of the paired difference over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule

SampleSchedule = Callable[["CacheSchedule", int], float]
"""PSNR in dB of one seed under a schedule, with dense attention."""


class Schedules(Protocol):
    """What the tuner needs of the choices at the block stack."""

    def schedules(self, full_calls: int) -> Iterator[CacheSchedule]:
        """Schedules with so many full calls, most promising first."""

    def adopt(self, schedule: CacheSchedule) -> None:
        """From now on this is the schedule with so many full calls."""


class ScheduleTuner:
    """Spends a fixed number of samples on the number of full calls that the search asks for.

    Args:
        stack: proposes schedules and adopts one.
        sample: measures one.
        seeds: tune seeds, at least two.
        samples: how many samples, one seed each, there are in all. The first number of full calls
            that is asked for takes them: later ones are near it, and are left to the recording.
    """

    def __init__(
        self, stack: Schedules, sample: SampleSchedule, seeds: Sequence[int], samples: int
    ) -> None:
        self._stack, self._sample = stack, sample
        self._seeds, self._left = tuple(seeds), samples
        self._tuned: set[int] = set()
        self.notes: tuple[str, ...] = ()

    def tune(self, proposed: CacheSchedule) -> bool:
        """Whether a better schedule with as many full calls as `proposed` has been adopted."""
        count = len(proposed.full)
        affordable = self._left // len(self._seeds)
        if not proposed.rows or count in self._tuned or affordable < 2 or len(self._seeds) < 2:
            return False
        self._tuned.add(count)
        best, values = proposed, self._measure(proposed)
        tried = 1
        for other in self._stack.schedules(count):
            if tried >= affordable:
                break
            if other.full == proposed.full:
                continue
            tried += 1
            found = self._measure(other)
            if surely_better(found, values):
                best, values = other, found
        self._stack.adopt(best)
        self.notes = (
            *self.notes,
            f"the {count} full calls were chosen among {tried} schedules by sampling "
            f"{len(self._seeds)} tune seeds",
        )
        return best is not proposed

    def _measure(self, schedule: CacheSchedule) -> list[float]:
        self._left -= len(self._seeds)
        return [self._sample(schedule, seed) for seed in self._seeds]


def surely_better(found: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the mean paired difference is above zero by more than its standard error."""
    differences = [a - b for a, b in zip(found, before, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) > error
