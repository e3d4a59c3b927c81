from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ditopt.runtime import (
    InputRoles,
    Programs,
    StepRuntime,
    StepSchedule,
    TrajectoryTracker,
    cache_bytes,
    session,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIMESTEPS = [900.0, 700.0, 500.0, 300.0, 100.0]
LINEAR = StepSchedule.build(5, [0, 1, 3], {2: [2.0, -1.0], 4: [1.5, -0.5]}, timesteps=TIMESTEPS)
TOKENS = (1, 4608, 512)


def make_runtime() -> StepRuntime:
    programs = Programs(
        head=lambda inputs: ((inputs[0],), None),
        body=lambda inputs, carry, rest, phase: (carry[0] + inputs[1][0] / 1000,),
        tail=lambda inputs, outputs, rest: outputs[0],
        base=(0,),
        roles=InputRoles(timestep=1, varying=(0,), invariant=(2,)),
    )
    return StepRuntime(programs, LINEAR, TrajectoryTracker(LINEAR))


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def call(runtime: StepRuntime, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
    return runtime(x, t[None], text)


@pytest.mark.usefixtures("no_sync")
def test_counted_session_never_waits_for_the_device() -> None:
    runtime, text = make_runtime(), torch.ones(1, device="cuda")
    x = torch.randn(TOKENS, device="cuda", dtype=torch.bfloat16)
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    for run in range(3):
        if run == 1:  # the first run copies the coefficients to the device
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with session("a", calls=5):
            results = [call(runtime, x, t, text) for t in timesteps]
    torch.cuda.set_sync_debug_mode("default")
    assert runtime.artifact.counters.skipped == 6
    for t, result in zip(TIMESTEPS, results, strict=True):
        torch.testing.assert_close(result, x + t / 1000, atol=0.04, rtol=0)


@pytest.mark.usefixtures("no_sync")
def test_session_waits_only_in_the_first_two_calls() -> None:
    runtime, text = make_runtime(), torch.ones(1, device="cuda")
    x, timesteps = torch.randn(TOKENS, device="cuda"), torch.tensor(TIMESTEPS, device="cuda")
    with session("warm", calls=5):
        for t in timesteps:
            call(runtime, x, t, text)
    with session("b"):
        for i, t in enumerate(timesteps):
            if i == 2:
                torch.cuda.set_sync_debug_mode("error")
            call(runtime, x, t, text)
    torch.cuda.set_sync_debug_mode("default")
    assert runtime.artifact.counters.skipped == 4


def test_stored_bytes_are_those_predicted() -> None:
    runtime, text = make_runtime(), torch.ones(1, device="cuda")
    x = torch.randn(TOKENS, device="cuda", dtype=torch.bfloat16)
    held, before = [], torch.cuda.memory_allocated()
    for t in torch.tensor(TIMESTEPS, device="cuda"):
        call(runtime, x, t, text)
        held.append(torch.cuda.memory_allocated() - before)
    predicted = cache_bytes(LINEAR, [(TOKENS, torch.bfloat16)])
    assert predicted <= max(held) <= 1.05 * predicted
    assert held[-1] <= 0.01 * predicted  # the coefficients remain
