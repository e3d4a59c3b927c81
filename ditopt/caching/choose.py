"""Choosing among candidate schedules by real sampling, within a stated number of runs.

A short list goes through sampling, then the winner's full calls are moved one at a time while that
helps (BudCache, arXiv 2606.13496, searches by sampling alone; here the recording proposes and
orders). Samples of tune seeds choose, so what they say of the winner is no quality claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditopt.caching.cache_schedule import CacheSchedule
from ditopt.caching.candidates import fitted

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[[CacheSchedule], float]
"""Mean PSNR of a schedule over the tune seeds, in dB."""


@dataclass(frozen=True)
class Chosen:
    """What sampling chose.

    Attributes:
        schedule: the best one.
        psnr_db: its score.
        sampled: every schedule that was sampled, with its score, in order.
    """

    schedule: CacheSchedule
    psnr_db: float
    sampled: tuple[tuple[CacheSchedule, float], ...]


def choose_by_sampling(
    gram: Tensor,
    candidates: Sequence[tuple[int, ...]],
    score: Score,
    *,
    short_list: int = 8,
    moves: int = 12,
    history: int = 2,
) -> Chosen:
    """The best of a short list, improved by moving single full calls.

    Args:
        gram: [T, T] inner products; rows of moved schedules are fitted to it.
        candidates: choices of full calls, at least one, most promising first.
        score: samples a schedule.
        short_list: candidates that are sampled.
        moves: further schedules that may be sampled.
        history: residuals that a fitted row may combine.
    """
    listed = [fitted(gram, full, history) for full in candidates[:short_list]]
    sampled = [(schedule, score(schedule)) for schedule in listed]
    known = {schedule.full for schedule, _ in sampled}
    best, value = max(sampled, key=lambda pair: pair[1])
    improved = True
    while improved:
        improved = False
        for full in neighbours(gram, best, history):
            if full in known:
                continue
            if moves <= 0:
                break
            moves -= 1
            known.add(full)
            schedule = fitted(gram, full, history)
            found = score(schedule)
            sampled.append((schedule, found))
            if found > value:
                best, value, improved = schedule, found, True
                break
    return Chosen(best, value, tuple(sampled))


def neighbours(gram: Tensor, schedule: CacheSchedule, history: int = 2) -> list[tuple[int, ...]]:
    """Schedules with one full call, not call 0, moved by one or two; least recorded error first."""
    found = {
        tuple(sorted({*schedule.full, call + shift} - {call}))
        for call in schedule.full[1:]
        for shift in (-1, 1, -2, 2)
        if 0 < call + shift < schedule.calls and call + shift not in schedule.full
    }
    return sorted(found, key=lambda full: (fitted(gram, full, history).error or 0.0, full))
