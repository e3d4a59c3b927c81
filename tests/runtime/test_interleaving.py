"""Whatever the order of calls, a skip combines residuals of its own run and of the right calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditopt.errors import DitoptWarning
from ditopt.runtime import StepSchedule, TrajectoryTracker, session

CALLS = 6
TIMESTEPS = [900.0, 700.0, 500.0, 300.0, 200.0, 100.0]
ROWS = {1: (1.0,), 3: (1.5, -0.5), 4: (2.0, -1.0)}
FULL = [0, 2, 5]


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Calls (prompt, run, call): up to two runs per prompt, some given up, all interleaved."""
    queues = []
    for prompt in range(draw(st.integers(1, 3))):
        for run in range(draw(st.integers(1, 2))):
            length = draw(st.integers(1, CALLS))
            queues.append([(prompt, run, call) for call in range(length)])
    order = []
    while queues:
        # Long stretches of one run are as interesting as strict alternation.
        queue = queues[draw(st.integers(0, len(queues) - 1))]
        for _ in range(draw(st.integers(1, CALLS))):
            order.append(queue.pop(0))
            if not queue:
                queues.remove(queue)
                break
    return order


def residual(run_id: float, call: int) -> float:
    return run_id * (1 + TIMESTEPS[call])


@pytest.mark.parametrize("named", [False, True])
@given(order=traffic(), branches=st.integers(1, 2))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_skip_never_uses_another_run(
    make_fake: Callable[..., Any],
    named: bool,
    order: list[tuple[int, int, int]],
    branches: int,
) -> None:
    schedule = StepSchedule.build(CALLS, FULL, ROWS, timesteps=TIMESTEPS, branches=branches)
    fake = make_fake(schedule, TrajectoryTracker(schedule))
    # The fake's weight stands for the run: its residual is then known by nobody else.
    run_ids = {key: float(i + 1) for i, key in enumerate(sorted({o[:2] for o in order}))}
    texts = {prompt: torch.ones(2) for prompt, _, _ in order}
    fake.runtime.programs = _with_run_in_latents(fake.runtime.programs)
    for prompt, run, call in order:
        run_id = run_ids[prompt, run]
        x, t = torch.full((1, 2), run_id), torch.tensor([TIMESTEPS[call]])
        ran_before = fake.ran["head"], fake.runtime.artifact.counters.skipped
        with warnings.catch_warnings(), session(run_id) if named else nullcontext():
            warnings.simplefilter("ignore", DitoptWarning)
            result = fake.runtime(fake.weight, x, t, texts[prompt])
        assert fake.ran["head"] == ran_before[0] + 1
        expected = residual(run_id, call)
        if fake.runtime.artifact.counters.skipped > ran_before[1]:
            assert call in ROWS
            stored = [source for source in reversed(FULL) if source < call]
            row = zip(ROWS[call], stored, strict=False)
            expected = sum(c * residual(run_id, source) for c, source in row)
        else:
            assert not (named and call in ROWS)
        torch.testing.assert_close(result, x + expected)


def _with_run_in_latents(programs: Any) -> Any:
    def body(inputs: Any, carry: Any, rest: Any, phase: int) -> Any:
        _, x, timestep, _ = inputs
        return [carry[0] + x * (1 + timestep)]

    object.__setattr__(programs, "body", body)
    return programs
