from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.caching import (
    CacheSchedule,
    choose_by_sampling,
    draw_calls,
    fit_rows,
    fitted,
    neighbours,
    ranking_error,
    schedule_error,
    search_schedules,
)


def curved_run(calls: int, seed: int = 0, noise: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, calls, dtype=torch.float64)[:, None]
    a, b, e = torch.randn(3, 1, 60, generator=generator, dtype=torch.float64)
    rough = noise * torch.randn(calls, 60, generator=generator, dtype=torch.float64)
    run = a + b * torch.exp(-5 * t) + e * torch.sin(4 * t) + rough
    return run @ run.T


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14), st.integers(0, 5), st.sampled_from([0.0, 0.1, 10.0]))
def test_every_budget_has_valid_and_different_choices(calls: int, seed: int, noise: float) -> None:
    gram = curved_run(calls, seed, noise)
    found = draw_calls(gram, steps=[1.0] * calls)
    assert sorted(found) == list(range(1, calls + 1))
    for k, choices in found.items():
        assert len(set(choices)) == len(choices) >= 1
        for full in choices:
            assert len(full) == k
            schedule = fitted(gram, full)
            schedule.to_steps()
            assert all(abs(sum(row) - 1) < 1e-9 for row in schedule.rows.values())


def test_degenerate_recordings_still_give_choices() -> None:
    for gram in (torch.zeros(6, 6), torch.ones(6, 6)):
        assert {len(full) for choices in draw_calls(gram).values() for full in choices} == set(
            range(1, 7)
        )


def test_the_first_choice_spreads_calls_by_drift() -> None:
    """Reuse errors decide where, fitted rows are what runs there."""
    gram = curved_run(20)
    drift = {len(s.full): s.full for s in search_schedules(gram, history=1, forced=[0, 19])}
    for k, choices in draw_calls(gram).items():
        if k in drift:
            assert choices[0] == drift[k]
    rows = fit_rows(gram, drift[6])
    assert fitted(gram, drift[6]).rows == rows


def test_ranking_error_weighs_by_each_residual_s_energy() -> None:
    gram = curved_run(9)
    schedule = CacheSchedule(9, (0, 3, 6), fit_rows(gram, (0, 3, 6)))
    weights = (1 / gram.diagonal()).tolist()
    assert ranking_error(gram, schedule) == pytest.approx(schedule_error(gram, schedule, weights))
    assert ranking_error(7.0 * gram, schedule) == pytest.approx(ranking_error(gram, schedule))


def test_neighbours_move_one_call_and_keep_the_first() -> None:
    gram = curved_run(10)
    start = fitted(gram, (0, 1, 4, 9))
    found = neighbours(gram, start)
    assert set(found) == {
        *((0, k, 4, 9) for k in (2, 3)),
        *((0, 1, k, 9) for k in (2, 3, 5, 6)),
        *((0, 1, 4, k) for k in (7, 8)),
    }
    errors = [fitted(gram, full).error or 0.0 for full in found]
    assert errors == sorted(errors)


class Sampler:
    """Scores by the distance to hidden calls; counts how often it is asked."""

    def __init__(self, best: tuple[int, ...]) -> None:
        self.best, self.asked = best, list[tuple[int, ...]]()

    def __call__(self, schedule: CacheSchedule) -> float:
        self.asked.append(schedule.full)
        return -sum(abs(a - b) for a, b in zip(schedule.full, self.best, strict=True))


def test_the_best_of_the_short_list_is_improved_within_its_budget() -> None:
    gram, sampler = curved_run(20), Sampler((0, 3, 9, 15, 19))
    candidates = [(0, 1, 2, 3, 4), (0, 4, 9, 14, 19), (0, 3, 9, 15, 19)]
    chosen = choose_by_sampling(gram, candidates, sampler, short_list=2, moves=40)
    assert chosen.schedule.full == sampler.best
    assert chosen.psnr_db == 0
    assert sampler.asked == [schedule.full for schedule, _ in chosen.sampled]
    assert len(set(sampler.asked)) == len(sampler.asked)

    sampler = Sampler((0, 3, 9, 15, 19))
    chosen = choose_by_sampling(gram, candidates, sampler, short_list=2, moves=3)
    assert len(sampler.asked) == 5
    assert chosen.psnr_db == max(value for _, value in chosen.sampled)
    chosen = choose_by_sampling(gram, candidates, Sampler(sampler.best), short_list=1, moves=0)
    assert chosen.schedule.full == candidates[0]
