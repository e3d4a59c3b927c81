from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ditopt.errors import PlanError
from ditopt.runtime import (
    InputRoles,
    Programs,
    StepRuntime,
    StepSchedule,
    TrajectoryTracker,
    cache_bytes,
    session,
)

TIMESTEPS = [900.0, 700.0, 500.0, 300.0, 100.0]
LINEAR = StepSchedule.build(5, [0, 1, 3], {2: [2.0, -1.0], 4: [1.5, -0.5]}, timesteps=TIMESTEPS)


def test_no_plan_and_a_plan_without_choices_track_nothing(make_fake: Callable[..., Any]) -> None:
    for schedule in (None, StepSchedule.build(5, range(5), {}, timesteps=TIMESTEPS)):
        fake = make_fake(schedule)
        assert fake.runtime.tracker is None
        assert [fake(torch.randn(1, 2), 7.0, torch.ones(1)) for _ in range(3)] == ["full"] * 3
        assert fake.runtime.artifact.counters.full == 3


def test_schedule_needs_its_own_tracker() -> None:
    programs = Programs(lambda i: ((), None), lambda *a: (), lambda *a: None, base=())
    for tracker in (None, TrajectoryTracker(StepSchedule.build(3, range(3), {}))):
        with pytest.raises(PlanError, match="tracker of its own"):
            StepRuntime(programs, LINEAR, tracker)


class TwoStreams:
    """Outputs: a residual stream, a passed-through carried tensor, and one without a base."""

    def __init__(self) -> None:
        roles = InputRoles(timestep=1, varying=(0,), invariant=(2,))
        programs = Programs(self.head, self.body, self.tail, base=(0, 1, None), roles=roles)
        self.tracker = TrajectoryTracker(LINEAR)
        self.runtime = StepRuntime(programs, LINEAR, self.tracker)
        self.live_bytes: list[int] = []

    def head(self, inputs: Any) -> Any:
        return (inputs[0], inputs[0] * 2), "rest"

    def body(self, inputs: Any, carry: Any, rest: Any, phase: int) -> Any:
        assert rest == "rest"
        t = inputs[1]
        return carry[0] + t, carry[1], t.expand(4).clone()

    def tail(self, inputs: Any, outputs: Any, rest: Any) -> Any:
        copies = [output.clone() for output in outputs]
        for output in outputs:
            if output.data_ptr() != inputs[0].data_ptr():
                output.zero_()  # a fused kernel may reuse these buffers
        return copies

    def stored(self) -> list[tuple[torch.Tensor, ...]]:
        runs = self.tracker._runs.values()
        return [r for run in runs for b in run.branches.values() for r in b.residuals.values()]


def test_outputs_with_and_without_base_and_a_tail_that_overwrites_them() -> None:
    model, text = TwoStreams(), torch.ones(1)
    sizes = []
    for t in TIMESTEPS:
        x = torch.randn(4)
        stream, passed, plain = model.runtime(x.clone(), torch.tensor([t]), text)
        torch.testing.assert_close(stream, x + t)  # linear in t where it is forecast, too
        torch.testing.assert_close(passed, x * 2)
        torch.testing.assert_close(plain, torch.full((4,), t))
        sizes.append(sum(r.untyped_storage().nbytes() for rs in model.stored() for r in rs))
    assert model.runtime.artifact.counters.skipped == 2
    assert max(sizes) == cache_bytes(LINEAR, [((4,), torch.float32)] * 3)
    assert sizes[-1] == 0


def test_residual_that_no_skip_reads_is_not_stored() -> None:
    schedule = StepSchedule.build(4, [0, 1, 3], {2: [1.0]}, timesteps=TIMESTEPS[:4])
    tracker = TrajectoryTracker(schedule)
    roles = InputRoles(timestep=1, varying=(0,), invariant=(2,))
    runtime = StepRuntime(
        Programs(
            lambda i: ((i[0],), None),
            lambda i, c, r, p: (c[0] + 1,),
            lambda i, o, r: o[0],
            (0,),
            roles,
        ),
        schedule,
        tracker,
    )
    text, stored = torch.ones(1), []
    for t in TIMESTEPS[:4]:
        runtime(torch.randn(2), torch.tensor([t]), text)
        (run,) = tracker._runs.values()
        stored.append([sorted(branch.residuals) for branch in run.branches.values()])
    assert stored == [[[]], [[1]], [[]], [[]]]


def test_session_forgets_when_it_is_over(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(LINEAR), torch.ones(1)
    with session():
        fake(torch.randn(1, 2), TIMESTEPS[0], text)
        assert len(fake.runtime.tracker._runs) == 1
    assert not fake.runtime.tracker._runs


def test_freed_prompts_do_not_keep_residuals(make_fake: Callable[..., Any]) -> None:
    fake = make_fake(LINEAR)
    for _ in range(5):
        fake(torch.randn(1, 2), TIMESTEPS[0], torch.ones(1))
    assert len(fake.runtime.tracker._runs) == 1


def test_under_torch_compile_the_branch_costs_no_recompilation() -> None:
    """A Dynamo backend that returns a StepRuntime: one graph, whatever the steps do."""
    module = torch.nn.Linear(3, 3)
    compiled_graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiled_graphs.append(graph)
        names: list[str | None] = []
        for node in graph.graph.find_nodes(op="placeholder"):
            user = next((n for n in ("x", "timestep", "text") if node.name == f"l_{n}_"), None)
            names.append(user)
        roles = InputRoles.from_names(names, timestep="timestep", varying=["x"])
        at = names.index("x")
        programs = Programs(
            head=lambda inputs: ((inputs[at],), None),
            body=lambda inputs, carry, rest, phase: graph(*inputs),
            tail=lambda inputs, outputs, rest: tuple(outputs),
            base=(0,),
            roles=roles,
        )
        return StepRuntime(programs, LINEAR, TrajectoryTracker(LINEAR))

    def model(x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return x + module(text) * timestep

    compiled, text = torch.compile(model, backend=backend, fullgraph=True), torch.randn(3)
    with torch.no_grad():
        for _ in range(2):
            for t in TIMESTEPS:
                x, timestep = torch.randn(3), torch.tensor([t])
                torch.testing.assert_close(
                    compiled(x, timestep, text), model(x, timestep, text), rtol=1e-4, atol=1e-4
                )
    assert len(compiled_graphs) == 1
