from __future__ import annotations

from collections.abc import Iterator

import pytest

from ditopt.caching import CacheSchedule
from ditopt.search.tuning import ScheduleTuner, surely_better

CALLS = 10


def schedule(*full: int) -> CacheSchedule:
    rows = {call: (1.0,) for call in range(CALLS) if call not in full}
    return CacheSchedule(CALLS, full, rows)


class Predictor:
    def __init__(self) -> None:
        self.adopted: list[CacheSchedule] = []

    def schedules(self, full_calls: int) -> Iterator[CacheSchedule]:
        for last in range(full_calls - 1, CALLS):
            yield schedule(*range(full_calls - 1), last)

    def adopt(self, schedule: CacheSchedule) -> None:
        self.adopted.append(schedule)


class Sampler:
    """dB by the last full call; `spread` is what seeds differ by, in a different way each."""

    def __init__(self, spread: float) -> None:
        self.spread, self.asked = spread, list[tuple[tuple[int, ...], int]]()

    def __call__(self, schedule: CacheSchedule, seed: int) -> float:
        self.asked.append((schedule.full, seed))
        return 30.0 + schedule.full[-1] + self.spread * (schedule.full[-1] * seed % 7)


@pytest.mark.parametrize(("samples", "tried"), [(4, 2), (8, 4), (9, 4), (99, 8)])
def test_samples_are_bounded_and_the_best_is_adopted(samples: int, tried: int) -> None:
    predictor, sampler = Predictor(), Sampler(0.0)
    tuner = ScheduleTuner(predictor, sampler, [1000, 1001], samples)
    first = schedule(0, 1, 2)
    assert tuner.tune(first) is True
    assert len(sampler.asked) == 2 * tried <= samples
    assert sampler.asked[:2] == [(first.full, 1000), (first.full, 1001)]
    assert predictor.adopted == [schedule(0, 1, 1 + tried)]
    assert str(tried) in tuner.notes[0]
    assert tuner.tune(first) is False  # each number of full calls once
    assert len(sampler.asked) == 2 * tried


def test_a_gain_within_the_seeds_spread_does_not_count() -> None:
    predictor, sampler = Predictor(), Sampler(50.0)
    first = schedule(0, 1, 2)
    assert ScheduleTuner(predictor, sampler, [0, 3], 8).tune(first) is False
    assert predictor.adopted == [first]


@pytest.mark.parametrize(("seeds", "samples"), [([1], 8), ([1, 2], 3)])
def test_too_few_samples_leave_the_recording_s_choice(seeds: list[int], samples: int) -> None:
    predictor, sampler = Predictor(), Sampler(0.0)
    assert ScheduleTuner(predictor, sampler, seeds, samples).tune(schedule(0, 1, 2)) is False
    assert not sampler.asked
    dense = CacheSchedule(CALLS, tuple(range(CALLS)), {})
    assert ScheduleTuner(predictor, sampler, [1, 2], 8).tune(dense) is False


def test_better_means_beyond_the_standard_error() -> None:
    assert surely_better([2.0, 3.0], [1.0, 2.0])
    assert not surely_better([1.0, 2.0], [1.0, 2.0])
    assert surely_better([3.0, 5.0], [1.0, 2.0])  # differences 2, 3: mean 2.5, error 0.5
    assert not surely_better([9.0, 1.0], [1.0, 2.0])  # differences 8, -1: mean 3.5, error 4.5
