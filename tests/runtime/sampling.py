"""A sampler's calls, as the tests of trajectories make them on a model that only counts."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ditopt.runtime import StepSchedule

TIMESTEPS = (1000.0, 900.0, 750.0, 600.0, 450.0, 300.0, 150.0, 20.0)
ROWS = {2: (2.5, -1.5), 4: (2.0, -1.0), 6: (1.5, -0.5)}
PLAN = ["full", "full", "skip", "full", "skip", "full", "skip", "full"]
FULL = ["full"] * 8


def make_schedule(branches: int = 1, timesteps: Any = TIMESTEPS, **changes: Any) -> StepSchedule:
    return StepSchedule.build(
        8, [0, 1, 3, 5, 7], ROWS, timesteps=timesteps, branches=branches, **changes
    )


def latents(batch: int = 1, size: int = 4) -> Tensor:
    return torch.randn(batch, size)


def prompt(value: float = 1.0) -> Tensor:
    return torch.full((3,), value)


def sample(fake: Any, text: Tensor, timesteps: Any = TIMESTEPS, batch: int = 1) -> list[str]:
    return [fake(latents(batch), t, text) for t in timesteps]


def doubts(fake: Any) -> dict[str, int]:
    return dict(fake.runtime.artifact.counters.doubts)


def session_off() -> Any:
    return threading.Lock()  # any context manager without effect


def assert_extrapolates(fake: Any, t: float, text: Tensor) -> None:
    call = TIMESTEPS.index(t)
    full = [i for i in (5, 3, 1, 0) if i < call][:2]
    row = zip(ROWS[call], full, strict=True)
    expected = sum(c * 3.0 * text.mean() * (1 + TIMESTEPS[i]) for c, i in row)
    torch.testing.assert_close(fake.last_skip, expected.expand_as(fake.last_skip))
