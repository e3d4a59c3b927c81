from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.caching import (
    CacheSchedule,
    evenly_spaced,
    fit_rows,
    forced_calls,
    magcache,
    relative_change,
    schedule_error,
    search_schedules,
    smoothcache,
    taylorseer,
    teacache,
    uniform,
)
from ditopt.errors import PlanError


def curved_run(calls: int, seed: int = 0, noise: float = 0.05) -> Tensor:
    """[T, T] Gram matrix of residuals that change fast at first and slowly later."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, calls, dtype=torch.float64)[:, None]
    a, b, c = torch.randn(3, 1, 80, generator=generator, dtype=torch.float64)
    e = torch.randn(calls, 80, generator=generator, dtype=torch.float64)
    run = a + b * torch.exp(-6 * t) + 0.3 * c * torch.sin(4 * t) + noise * e
    return run @ run.T


@settings(max_examples=12, deadline=None)
@given(
    calls=st.integers(2, 8),
    seed=st.integers(0, 999),
    history=st.integers(1, 2),
    forced=st.sets(st.integers(0, 7), max_size=3),
    weights=st.lists(st.floats(0, 5), min_size=8, max_size=8),
    max_gain=st.sampled_from([1.5, 5.0]),
)
def test_equals_brute_force(
    calls: int, seed: int, history: int, forced: set[int], weights: list[float], max_gain: float
) -> None:
    gram, weights = curved_run(calls, seed, noise=0.3), [w + 0.1 for w in weights[:calls]]
    must = {call for call in forced if call < calls} | {0}
    found = search_schedules(gram, weights=weights, forced=must, history=history, max_gain=max_gain)
    assert [len(schedule.full) for schedule in found] == list(range(len(must), calls + 1))
    for schedule in found:
        errors = []
        for rest in combinations(sorted(set(range(calls)) - must), len(schedule.full) - len(must)):
            full = tuple(sorted({*must, *rest}))
            rows = fit_rows(gram, full, history=history, max_gain=max_gain)
            errors.append(schedule_error(gram, CacheSchedule(calls, full, rows), weights))
        assert schedule.error == pytest.approx(min(errors), rel=1e-6, abs=1e-12)
        assert schedule_error(gram, schedule, weights) == pytest.approx(
            schedule.error, rel=1e-6, abs=1e-12
        )


def test_rows_are_those_of_fit_row_and_make_a_step_schedule() -> None:
    gram = curved_run(20)
    for schedule in search_schedules(gram):
        for call, row in fit_rows(gram, schedule.full).items():
            assert schedule.rows[call] == pytest.approx(row)
        steps = schedule.to_steps(timesteps=[float(20 - t) for t in range(20)], branches=2)
        assert (sum(steps.full), steps.branches) == (len(schedule.full), 2)
        assert set(forced_calls(20)) <= set(schedule.full)


@pytest.mark.parametrize("history", [1, 2])
def test_constant_residuals_cost_nothing(history: int) -> None:
    schedules = search_schedules(torch.ones(9, 9), history=history)
    assert [schedule.error for schedule in schedules] == [0.0] * 7
    assert search_schedules(torch.zeros(5, 5))[0].error == 0.0


def test_more_full_calls_help_on_smooth_runs() -> None:
    errors = [schedule.error for schedule in search_schedules(curved_run(24, noise=0.0))]
    assert all(a >= b for a, b in pairwise(errors))
    assert errors[-1] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_beats_every_baseline_on_the_recorded_run(seed: int) -> None:
    gram = curved_run(24, seed)
    change = relative_change(gram)
    steps = [0.0, *change.diagonal(1).tolist()]
    ratios = [1.0, *(gram.diagonal()[1:] / gram.diagonal()[:-1]).sqrt().tolist()]
    found = {len(s.full): s for s in search_schedules(gram, forced=[0])}
    thresholds = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    baselines = [
        *(evenly_spaced(24, budget) for budget in (6, 8, 12)),
        *(teacache(steps, d) for d in thresholds),
        *(magcache(ratios, d, max_skips=24, retention=0.1) for d in thresholds),
        *(smoothcache(change, d, lookahead=24) for d in thresholds),
        *(taylorseer(24, interval) for interval in range(2, 8)),
        *(uniform(24, interval) for interval in range(1, 8)),
    ]
    for baseline in baselines:
        baseline.to_steps()  # a valid plan
        planned = found[len(baseline.full)]
        # The ridge gives up a little of the recorded run's optimum, for other runs' sake.
        assert planned.error <= schedule_error(gram, baseline) * 1.001 + 1e-12


def test_bad_requests_are_named() -> None:
    with pytest.raises(PlanError, match="history is 3"):
        search_schedules(curved_run(4), history=3)
    with pytest.raises(PlanError, match=r"forced calls \[0, 9\]"):
        search_schedules(curved_run(4), forced=[9])
    with pytest.raises(PlanError, match="4 numbers, none negative"):
        search_schedules(curved_run(4), weights=[1.0, 1.0, -1.0, 1.0])


def test_uniform_by_hand() -> None:
    assert uniform(9, 3).full == (0, 3, 6, 8)
    assert uniform(9, 3, last=False).full == (0, 3, 6)
    assert uniform(9, 3, first=2).full == (0, 1, 4, 7, 8)
    assert uniform(4, 1).rows == {}
    assert evenly_spaced(10, 4).full == (0, 2, 5, 7)


def test_taylorseer_by_hand() -> None:
    schedule = taylorseer(8, 3, first=3)
    assert schedule.full == (0, 1, 2, 5)
    assert schedule.rows[4] == pytest.approx((3.0, -2.0))
    assert schedule.rows[7] == pytest.approx((1 + 2 / 3, -2 / 3))


def test_teacache_by_hand() -> None:
    # Accumulated: 1: .1, 2: .3 >= .25 full, 3: .2, 4: .35 full, 5: last.
    assert teacache([9.0, 0.1, 0.2, 0.2, 0.15, 0.1], 0.25).full == (0, 2, 4, 5)
    # 2 x^2: .02, .08 (sum .1), .08 (sum .18), .045 (sum .225), last.
    changes = [9.0, 0.1, 0.2, 0.2, 0.15, 0.1]
    assert teacache(changes, 0.2, polynomial=(2.0, 0.0, 0.0)).full == (0, 4, 5)
    assert teacache([0.0, float("nan"), 0.0], 1.0).full == (0, 1, 2)  # doubt means full


def test_magcache_by_hand() -> None:
    # After call 1: product .9, error .1, skip; .81, .29, over .2: full; 1, skip; 1, skip; 1: full.
    ratios = [1.0, 1.0, 0.9, 0.9, 1.0, 1.0, 1.0]
    assert magcache(ratios, 0.2, max_skips=2).full == (0, 1, 3, 6)


def test_smoothcache_by_hand() -> None:
    change = torch.tensor([[abs(s - t) * 0.1 for t in range(8)] for s in range(8)])
    assert smoothcache(change, 0.25, lookahead=3).full == (0, 3, 6, 7)
    assert smoothcache(change, 0.95, lookahead=3).full == (0, 4, 7)
    assert smoothcache(change, 0.0).full == tuple(range(8))
