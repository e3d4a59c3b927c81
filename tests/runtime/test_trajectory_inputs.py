"""What prompts, weights and timesteps tell about the run that a call belongs to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from ditopt.errors import DitoptWarning
from ditopt.runtime import StepSchedule, TrajectoryTracker, invalidate, session, stats

from .sampling import (
    FULL,
    PLAN,
    TIMESTEPS,
    assert_extrapolates,
    doubts,
    latents,
    make_schedule,
    prompt,
    sample,
)


def test_rebuilt_prompt_is_full_without_a_session(make_fake: Callable[..., Any]) -> None:
    fake = make_fake(make_schedule())
    with pytest.warns(DitoptWarning, match=r"ditopt\.session"):
        assert [fake(latents(), t, prompt()) for t in TIMESTEPS] == FULL
    assert doubts(fake) == {"joined_late": 3}


def test_rebuilt_prompt_in_a_session(make_fake: Callable[..., Any]) -> None:
    fake = make_fake(make_schedule())
    with session():
        assert [fake(latents(), t, prompt()) for t in TIMESTEPS] == PLAN
    with session():  # a second branch that the plan does not have is not taken for the first
        seen = [fake(latents(), t, prompt(v)) for t in TIMESTEPS for v in (1.0, 2.0)]
    assert seen == ["full"] * 16


def test_rebuilt_prompts_of_two_branches_need_names(make_fake: Callable[..., Any]) -> None:
    fake = make_fake(make_schedule(2))
    with session("a"):
        seen = [fake(latents(), t, prompt(v)) for t in TIMESTEPS for v in (1.0, 2.0)]
    assert seen == ["full"] * 16
    for call, t in enumerate(TIMESTEPS):
        for value in (1.0, 2.0):
            text = prompt(value)
            with session("b", branch=value):
                assert fake(latents(), t, text) == PLAN[call]
            if PLAN[call] == "skip":
                assert_extrapolates(fake, t, text)


def test_rebuilt_prompts_in_a_session_do_not_pile_up(make_fake: Callable[..., Any]) -> None:
    fake, kept = make_fake(make_schedule(2)), []
    with session("a"):
        for keep in (False, True):  # the wrapper may even hold on to what it rebuilds
            for t in TIMESTEPS:
                for value in (1.0, 2.0):
                    kept.append(prompt(value))
                    assert fake(latents(), t, kept[-1]) == "full"
                    if not keep:
                        kept.clear()
            (run,) = fake.runtime.tracker._runs.values()
            assert len(run.branches) == (8 if keep else 1)


def test_prompt_rebuilt_once_after_the_first_step(
    make_fake: Callable[..., Any], accelerator: list[float | None]
) -> None:
    fake, texts = make_fake(make_schedule(2)), [prompt(1.0), prompt(2.0)]
    with session("a", calls=8):
        for call, t in enumerate(TIMESTEPS):
            if call == 1:
                texts = [prompt(1.0), prompt(2.0)]
            for text in texts:
                how = fake(latents(), t, text)
                assert how == ("full" if call == 2 else PLAN[call])
                if how == "skip":
                    assert_extrapolates(fake, t, text)
    assert accelerator == [900.0, 900.0]


def test_a_new_view_of_the_prompt_is_the_same_prompt(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    assert [fake(latents(), t, text[:]) for t in TIMESTEPS] == PLAN


def test_prompt_modified_in_place(make_fake: Callable[..., Any]) -> None:
    fake, text, seen = make_fake(make_schedule()), prompt(), []
    for call, t in enumerate(TIMESTEPS):
        if call == 2:
            text.mul_(2)
        seen.append(fake(latents(), t, text))
    assert seen == ["full", "full", "full", "full", "full", "full", "skip", "full"]
    assert doubts(fake) == {"inputs_changed": 2}


def test_weights_modified_mid_run(make_fake: Callable[..., Any]) -> None:
    fake, text, seen = make_fake(make_schedule()), prompt(), []
    for call, t in enumerate(TIMESTEPS):
        if call == 2:
            fake.weight.mul_(2)
        seen.append(fake(latents(), t, text))
    assert seen == ["full", "full", "full", "full", "full", "full", "skip", "full"]
    assert doubts(fake) == {"weights_changed": 2}


def test_invalidate_mid_run(make_fake: Callable[..., Any]) -> None:
    fake, text, seen = make_fake(make_schedule()), prompt(), []
    module = torch.nn.Module()
    module.weight = fake.weight
    for call, t in enumerate(TIMESTEPS):
        if call == 4:
            fake.weight.data.add_(1)  # leaves no trace on the parameter
            invalidate(module)
        seen.append(fake(latents(), t, text))
    assert seen == ["full", "full", "skip", "full", "full", "full", "full", "full"]
    assert stats(module)["doubts"] == {"weights_changed": 2}


def test_inference_tensors(make_fake: Callable[..., Any]) -> None:
    with torch.inference_mode():
        fake, text = make_fake(make_schedule()), prompt()
        with pytest.warns(DitoptWarning, match="inference tensors"):
            assert sample(fake, text) == FULL
        assert [decision.applied for decision in fake.runtime.tracker.notices.decisions] == [False]
        with session("a"):
            assert sample(fake, text) == PLAN


def test_no_timesteps_in_the_plan(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule(timesteps=None)), prompt()
    assert sample(fake, text) == FULL
    assert doubts(fake) == {"no_timestep": 8}
    with session("a"):
        assert [sample(fake, text) for _ in range(2)] == [PLAN] * 2


def test_timestep_per_token(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    clean_first_frame = torch.arange(100) >= 10
    assert [fake(latents(), t * clean_first_frame, text) for t in TIMESTEPS] == PLAN


def test_batch_of_several_timesteps(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    mixed = [torch.tensor([a, b]) for a, b in pairwise(TIMESTEPS)]
    assert [fake(latents(2), t, text) for t in mixed] == ["full"] * 7
    assert set(doubts(fake)) == {"mixed_timesteps"}


def test_timestep_in_bfloat16(make_fake: Callable[..., Any]) -> None:
    assert sample(make_fake(make_schedule()), prompt(), torch.tensor(TIMESTEPS).bfloat16()) == PLAN


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Pretends that timesteps are on an accelerator; collects what is read of them."""
    from ditopt.runtime import placement

    read: list[float | None] = []

    def spy(timestep: Any) -> float | None:
        read.append(original(timestep))
        return read[-1]

    original = placement.read_timestep
    monkeypatch.setattr(placement, "read_timestep", spy)
    monkeypatch.setattr(placement, "on_host", lambda timestep: False)
    return read


def test_session_reads_no_timestep_of_a_counted_run(
    make_fake: Callable[..., Any], accelerator: list[float | None]
) -> None:
    fake, texts = make_fake(make_schedule(2)), [prompt(), prompt(2.0)]
    with session("a", calls=8):
        for _ in range(2):
            for call, t in enumerate(TIMESTEPS):
                assert [fake(latents(), t, text) for text in texts] == [PLAN[call]] * 2
    assert accelerator == []


def test_session_reads_two_timesteps_of_a_branch(
    make_fake: Callable[..., Any], accelerator: list[float | None]
) -> None:
    fake = make_fake(make_schedule())
    with session("a"):
        assert sample(fake, prompt()) == PLAN
    assert accelerator == [1000.0, 900.0]
    with session("b"), pytest.warns(DitoptWarning, match="every step in full"):
        assert sample(fake, prompt(), TIMESTEPS[::2]) == ["full"] * 4


def test_counted_session_with_another_count(make_fake: Callable[..., Any]) -> None:
    fake = make_fake(make_schedule())
    with session("a", calls=5), pytest.warns(DitoptWarning, match="makes 5 calls, not 8"):
        assert sample(fake, prompt(), TIMESTEPS[:5]) == ["full"] * 5
    assert set(doubts(fake)) == {"calls_differ"}


@pytest.mark.parametrize("off", [{2}, {2, 3}, {3}, {1, 2, 3, 4}])
@pytest.mark.parametrize("empty_first", [False, True])
def test_session_notices_a_gap_without_reading_each_step(
    make_fake: Callable[..., Any],
    accelerator: list[float | None],
    off: set[int],
    empty_first: bool,
) -> None:
    fake, conditional, empty = make_fake(make_schedule(2)), prompt(1.0), prompt(0.5)
    with session("a", calls=8):
        for call, t in enumerate(TIMESTEPS):
            texts = [conditional] if call in off else [conditional, empty]
            for text in reversed(texts) if empty_first else texts:
                how = fake(latents(), t, text)
                if how == "skip":
                    assert_extrapolates(fake, t, text)
                if text is conditional:
                    assert how == PLAN[call]
    assert 0 < len(accelerator) <= 3


def test_forgotten_runs_are_bounded(make_fake: Callable[..., Any]) -> None:
    schedule = make_schedule()
    tracker = TrajectoryTracker(schedule, capacity=2)
    fake, texts = make_fake(schedule, tracker), [prompt(float(i)) for i in range(3)]
    with pytest.warns(DitoptWarning, match="more than 2 runs"):
        seen = [fake(latents(), t, text) for t in TIMESTEPS for text in texts]
    assert set(seen) == {"full"}
    assert [sample(fake, text) for text in texts] == [PLAN] * 3


def test_phases_follow_the_call_and_doubt_means_the_first(make_fake: Callable[..., Any]) -> None:
    schedule = StepSchedule.build(
        4, range(4), {}, timesteps=TIMESTEPS[:4], phases=[(0, 1), (1, 3), (3, 4)]
    )
    fake, text = make_fake(schedule), prompt()
    sample(fake, text, TIMESTEPS[:4])
    for t in TIMESTEPS[:4]:  # phases need the position only, not the run
        fake(latents(), t, prompt())
    with pytest.warns(DitoptWarning, match="not in the plan's order"):
        sample(fake, text, (1000.0, 900.0, 5.0, 600.0))
    assert fake.phases == [0, 1, 1, 2] * 2 + [0, 1, 0, 0]


def test_body_that_overwrites_its_input_is_not_cached(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    body = fake.runtime.programs.body

    def in_place(inputs: Any, carry: Any, rest: Any, phase: int) -> Any:
        (output,) = body(inputs, carry, rest, phase)
        return [carry[0].copy_(output)]

    object.__setattr__(fake.runtime.programs, "body", in_place)
    assert sample(fake, text) == FULL
    assert doubts(fake) == {"carry_mutated": 3}
