from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditopt.errors import PlanError
from ditopt.runtime import StepSchedule, cache_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": [1, 2, 3], "coefficients": {0: [1.0]}}, "call 0 is a skip call"),
        ({"coefficients": {1: [0.5, 0.5]}}, "skip call 1 uses 2 stored residuals, only 1 exist"),
        ({"coefficients": {1: []}}, "skip call 1 has no forecast coefficients"),
        ({"coefficients": {1: [0.9]}}, "coefficients of call 1 sum to 0.9, expected 1"),
        ({"coefficients": {1: [float("nan")]}}, "sum to nan"),
        ({"full": [0, 1, 2], "coefficients": {3: [40.0, -39.0]}}, r"sum \|c\| = 79"),
        ({"full": [0, 1, 2, 3]}, "call 1 is full and also has forecast"),
        ({"full": [0, 2, 9]}, "names call 9, expected 0 to 3"),
        ({"timesteps": [1.0]}, r"timesteps has 1 entries, expected 4"),
        ({"timesteps": [3.0, 2.0, 1.0, float("inf")]}, "not finite"),
        ({"phases": [(0, 2)]}, "phases end at call 2, expected 4"),
        ({"phases": [(0, 2), (3, 4)]}, r"phase \[3, 4\] does not continue from call 2"),
        ({"phases": [(0, 0), (0, 4)]}, r"phase \[0, 0\]"),
        ({"branches": 0}, "branches is 0"),
        ({"calls": 0, "full": [], "coefficients": {}}, "no calls"),
    ],
)
def test_bad_schedules_are_named(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"calls": 4, "full": [0, 2, 3], "coefficients": {1: [1.0]}}
    StepSchedule.build(**good)
    with pytest.raises(PlanError, match=message):
        StepSchedule.build(**{**good, **changes})


def test_sources_are_the_newest_full_calls() -> None:
    rows = {2: [2.0, -1.0], 4: [1.5, 0.0, -0.5]}
    schedule = StepSchedule.build(6, [0, 1, 3, 5], rows)
    assert schedule.history == 3
    assert schedule.sources[2] == ((1, 2.0), (0, -1.0))
    assert schedule.sources[4] == ((3, 1.5), (0, -0.5))
    assert schedule.last_use == {1: 2, 0: 4, 3: 4}  # call 5 is never read, so never stored


def test_phase_of_each_call() -> None:
    schedule = StepSchedule.build(5, range(5), {}, phases=[(0, 1), (1, 4), (4, 5)])
    assert [schedule.phase_of(call) for call in (*range(5), None)] == [0, 1, 1, 1, 2, 0]
    assert not schedule.trivial
    assert StepSchedule.build(5, range(5), {}).trivial


def test_find_prefers_calls_from_near_on() -> None:
    heun = (1000.0, 800.0, 800.0, 500.0)
    schedule = StepSchedule.build(4, range(4), {}, timesteps=heun)
    assert [schedule.find(800.0, near=near) for near in (0, 2, 3)] == [1, 2, 1]
    assert schedule.find(801.0) == 1  # bfloat16 keeps 8 bits
    assert schedule.find(700.0) is None


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=60, unique=True))
def test_a_timestep_matches_no_other_one(timesteps: list[float]) -> None:
    schedule = StepSchedule.build(len(timesteps), range(len(timesteps)), {}, timesteps=timesteps)
    for call, timestep in enumerate(timesteps):
        assert [i for i in range(len(timesteps)) if schedule.matches(i, timestep)] == [call]


def test_cache_bytes_counts_residuals_that_live_at_once() -> None:
    outputs = [((2, 3), torch.bfloat16), ((5,), torch.float32)]
    one = 2 * 3 * 2 + 5 * 4
    reuse = StepSchedule.build(6, [0, 2, 4], {1: [1.0], 3: [1.0], 5: [1.0]})
    linear = StepSchedule.build(6, [0, 1, 3, 5], {2: [2.0, -1.0], 4: [2.0, -1.0]}, branches=2)
    assert cache_bytes(reuse, outputs) == one
    assert cache_bytes(linear, outputs) == 2 * 2 * one
    assert cache_bytes(StepSchedule.build(6, range(6), {}), outputs) == 0
