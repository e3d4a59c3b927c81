"""A denoiser of three counted programs, whose skip results can be told from full ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ditopt.runtime import InputRoles, Programs, StepRuntime, StepSchedule, TrajectoryTracker

ROLES = InputRoles.from_names(
    [None, "hidden_states", "timestep", "prompt"], timestep="timestep", varying=["hidden_states"]
)


class FakeDenoiser:
    """x + weight * prompt * (1 + timestep), whose second term plays the block stack's residual."""

    def __init__(self, schedule: StepSchedule | None, tracker: TrajectoryTracker | None) -> None:
        self.ran: Counter[str] = Counter()
        self.phases: list[int] = []
        self.weight = torch.nn.Parameter(torch.tensor([3.0]), requires_grad=False)
        self.fail_in: str | None = None
        self.runtime = StepRuntime(
            Programs(self._head, self._body, self._tail, base=(0,), roles=ROLES), schedule, tracker
        )
        self.runtime.artifact.own([self.weight])

    def _run(self, program: str) -> None:
        self.ran[program] += 1
        if self.fail_in == program:
            self.fail_in = None
            raise RuntimeError(f"{program} failed")

    def _head(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], None]:
        self._run("head")
        return [inputs[1].clone()], None

    def _body(
        self, inputs: Sequence[Tensor], carry: Sequence[Tensor], rest: None, phase: int
    ) -> list[Tensor]:
        self._run("body")
        self.phases.append(phase)
        weight, _, timestep, prompt = inputs
        return [carry[0] + weight * prompt.mean() * (1 + timestep.max())]

    def _tail(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], rest: None) -> Tensor:
        self._run("tail")
        return outputs[0]

    def dense(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return x + self.weight * prompt.mean() * (1 + timestep.max())

    def __call__(self, x: Tensor, timestep: float | Tensor, prompt: Tensor) -> str:
        """Run one call; "full" when the body ran and the result is dense, else "skip"."""
        if not isinstance(timestep, Tensor):
            timestep = torch.full((x.shape[0],), float(timestep))
        before = self.ran["body"]
        result = self.runtime(self.weight, x, timestep, prompt)
        if self.ran["body"] == before:
            self.last_skip = result - x
            return "skip"
        torch.testing.assert_close(result, self.dense(x, timestep, prompt))
        return "full"


@pytest.fixture
def make_fake() -> Callable[..., FakeDenoiser]:
    def make(schedule: StepSchedule | None, tracker: TrajectoryTracker | None = None):
        if schedule is not None and tracker is None:
            tracker = TrajectoryTracker(schedule)
        return FakeDenoiser(schedule, tracker)

    return make
