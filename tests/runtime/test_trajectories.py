"""Every way in which sampling loops call a denoiser; a skip must never use another run's residual.

The plan below has 8 calls: F F S F S F S F, and skips extrapolate linearly or reuse.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.errors import DitoptWarning
from ditopt.runtime import StepSchedule, TrajectoryTracker, invalidate, session, stats

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


def test_skip_uses_the_forecast_of_its_own_run(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt(2.0)
    assert sample(fake, text) == PLAN
    residual = {t: 3.0 * 2.0 * (1 + t) for t in TIMESTEPS}
    expected = 1.5 * residual[300.0] - 0.5 * residual[600.0]
    torch.testing.assert_close(fake.last_skip, torch.full((1, 4), expected))
    assert fake.ran == {"head": 8, "body": 5, "tail": 8}
    assert doubts(fake) == {}


def test_runs_follow_each_other(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    assert [sample(fake, text) for _ in range(3)] == [PLAN] * 3
    assert sample(fake, prompt(4.0)) == PLAN


def test_batched_guidance_is_one_branch(make_fake: Callable[..., Any]) -> None:
    assert sample(make_fake(make_schedule()), prompt(), batch=2) == PLAN


@pytest.mark.parametrize("in_session", [False, True])
@pytest.mark.parametrize("branches", [2, 3])
def test_sequential_guidance(
    make_fake: Callable[..., Any], branches: int, in_session: bool
) -> None:
    fake = make_fake(make_schedule(branches))
    texts = [prompt(float(i)) for i in range(branches)]
    with session("a") if in_session else session_off():
        for t, expected in zip(TIMESTEPS, PLAN, strict=True):
            for text in texts:
                assert fake(latents(), t, text) == expected
                if expected == "skip":
                    assert_extrapolates(fake, t, text)


def session_off() -> Any:
    return threading.Lock()  # any context manager without effect


def assert_extrapolates(fake: Any, t: float, text: Tensor) -> None:
    call = TIMESTEPS.index(t)
    full = [i for i in (5, 3, 1, 0) if i < call][:2]
    row = zip(ROWS[call], full, strict=True)
    expected = sum(c * 3.0 * text.mean() * (1 + TIMESTEPS[i]) for c, i in row)
    torch.testing.assert_close(fake.last_skip, expected.expand_as(fake.last_skip))


@pytest.mark.parametrize("in_session", [False, True])
def test_guidance_switched_off_mid_run(make_fake: Callable[..., Any], in_session: bool) -> None:
    fake, conditional, empty = make_fake(make_schedule(2)), prompt(1.0), prompt(0.5)
    with session("a") if in_session else session_off():
        for call, (t, expected) in enumerate(zip(TIMESTEPS, PLAN, strict=True)):
            if call < 3:
                assert fake(latents(), t, empty) == expected
            assert fake(latents(), t, conditional) == expected
    assert sample(fake, prompt(3.0)) == PLAN


def test_guidance_comes_back_in_a_session(make_fake: Callable[..., Any]) -> None:
    fake, conditional, empty = make_fake(make_schedule(2)), prompt(1.0), prompt(0.5)
    seen = []
    with session("a"):
        for call, t in enumerate(TIMESTEPS):
            assert fake(latents(), t, conditional) == PLAN[call]
            if call not in (2, 3):
                seen.append(fake(latents(), t, empty))
    # Its residuals of calls 1 and 0 are too old for call 4, those of 3 are missing for call 6.
    assert seen == ["full"] * 6
    assert doubts(fake) == {"joined_late": 2}


def test_guidance_begins_late(make_fake: Callable[..., Any]) -> None:
    fake, conditional, empty = make_fake(make_schedule(2)), prompt(1.0), prompt(0.5)
    seen = []
    for call, t in enumerate(TIMESTEPS):
        assert fake(latents(), t, conditional) == PLAN[call]
        if call >= 3:
            seen.append(fake(latents(), t, empty))
    assert seen == ["full", "full", "full", "skip", "full"]


def test_batch_shrinks_mid_run(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    seen = [fake(latents(2 if t > 700 else 1), t, text) for t in TIMESTEPS]
    assert seen == ["full", "full", "skip", "full", "full", "full", "skip", "full"]


def test_two_evaluations_per_step(make_fake: Callable[..., Any]) -> None:
    heun = (1000.0, 800.0, 800.0, 500.0, 500.0, 200.0, 200.0, 0.0)
    fake = make_fake(make_schedule(timesteps=heun))
    assert [sample(fake, prompt(), heun) for _ in range(2)] == [PLAN] * 2


def test_two_experts_have_their_own_positions(make_fake: Callable[..., Any]) -> None:
    text = prompt()
    early = make_fake(make_schedule(timesteps=[t + 1000 for t in TIMESTEPS]))
    late = make_fake(make_schedule())
    for _ in range(2):
        assert [early(latents(), t + 1000, text) for t in TIMESTEPS] == PLAN
        assert sample(late, text) == PLAN


@pytest.mark.parametrize("in_session", [False, True])
def test_interleaved_requests(make_fake: Callable[..., Any], in_session: bool) -> None:
    fake, requests = make_fake(make_schedule()), {"a": prompt(1.0), "b": prompt(2.0)}
    shift = {"a": 0, "b": 2}  # b is two calls behind
    for tick in range(10):
        for key, text in requests.items():
            call = tick - shift[key]
            if 0 <= call < 8:
                with session(key) if in_session else session_off():
                    assert fake(latents(), TIMESTEPS[call], text) == PLAN[call]
                if PLAN[call] == "skip":
                    assert_extrapolates(fake, TIMESTEPS[call], text)


@pytest.mark.parametrize("shift", range(4))
def test_interleaved_requests_with_one_prompt_tensor(
    make_fake: Callable[..., Any], shift: int
) -> None:
    fake, text, seen = make_fake(make_schedule()), prompt(), []
    for tick in range(8 + shift):
        for who, call in (("a", tick), ("b", tick - shift)):
            if 0 <= call < 8:
                seen.append((who, fake(latents(), TIMESTEPS[call], text)))
    assert {how for _, how in seen[seen.index(("b", "full")) :]} == {"full"}
    assert doubts(fake)["restarted"] >= 3
    # The prompt's next two runs: one in full, to be sure that the others are over, one as planned.
    assert sample(fake, text)[-1] == "full"
    assert sample(fake, text) == PLAN


def test_threads_with_one_prompt_tensor(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    barrier, seen = threading.Barrier(3), []

    def request() -> None:
        for t in TIMESTEPS:
            barrier.wait()
            # `fake` judges by shared counts: only the runtime's counters are read here.
            fake.runtime(fake.weight, latents(), torch.tensor([t]), text)
        seen.append(True)

    threads = [threading.Thread(target=request) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = fake.runtime.artifact.counters
    assert (len(seen), counters.calls, counters.skipped) == (3, 24, 9)


@pytest.mark.parametrize("in_session", [False, True])
@pytest.mark.parametrize("program", ["head", "body", "tail"])
@pytest.mark.parametrize("failing", range(8))
def test_exception_inside_the_model(
    make_fake: Callable[..., Any], program: str, failing: int, in_session: bool
) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    if program == "body" and PLAN[failing] == "skip":
        return
    with session("a") if in_session else session_off():
        for call in range(failing):
            fake(latents(), TIMESTEPS[call], text)
        fake.fail_in = program
        with pytest.raises(RuntimeError, match="failed"):
            fake(latents(), TIMESTEPS[failing], text)
        assert sample(fake, text) == PLAN


def test_retry_of_a_failed_call_runs_in_full(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    with session("a", calls=8):
        for t in TIMESTEPS[:4]:
            fake(latents(), t, text)
        fake.fail_in = "tail"
        with pytest.raises(RuntimeError, match="tail failed"):
            fake(latents(), TIMESTEPS[4], text)
        rest = [fake(latents(), t, text) for t in TIMESTEPS[4:]]
    assert rest == ["full"] * 4
    assert doubts(fake) == {"joined_late": 2}


@pytest.mark.parametrize("in_session", [False, True])
def test_run_given_up_between_calls(make_fake: Callable[..., Any], in_session: bool) -> None:
    fake, text = make_fake(make_schedule()), prompt()

    def interrupted() -> None:
        with session("a") if in_session else session_off():
            sample(fake, text, TIMESTEPS[:5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with session("a") if in_session else session_off():
        # A session tells that the run is over; without one it might be another, interleaved one.
        assert sample(fake, text) == (PLAN if in_session else FULL)
        assert sample(fake, text) == PLAN


@pytest.mark.parametrize("in_session", [False, True])
def test_another_number_of_steps_is_full_and_warned_once(
    make_fake: Callable[..., Any], in_session: bool
) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    with session("a") if in_session else session_off():
        with pytest.warns(DitoptWarning, match="every step in full") as caught:
            assert sample(fake, text, TIMESTEPS[::2]) == ["full"] * 4
        assert len(caught) == 1
        assert sample(fake, text, [t + 7 for t in TIMESTEPS]) == FULL
        assert sample(fake, prompt(2.0), TIMESTEPS[::2]) == ["full"] * 4


def test_planned_for_30_steps_used_with_20(make_fake: Callable[..., Any]) -> None:
    def flow(steps: int) -> list[float]:
        return [1000 * (1 - i / steps) for i in range(steps)]

    skips = range(3, 29)
    schedule = StepSchedule.build(
        30, [0, 1, 2, 29], dict.fromkeys(skips, (1.0,)), timesteps=flow(30)
    )
    fake = make_fake(schedule)
    with pytest.warns(DitoptWarning, match="every step in full"):
        assert sample(fake, prompt(), flow(20)) == ["full"] * 20
    assert sample(fake, prompt(), flow(30)).count("skip") == 26


def test_image_to_image_runs_the_plans_tail(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    for _ in range(2):
        assert sample(fake, text, TIMESTEPS[3:]) == ["full", "full", "full", "skip", "full"]


@pytest.mark.parametrize("in_session", [False, True])
def test_changed_resolution_mid_run(make_fake: Callable[..., Any], in_session: bool) -> None:
    fake, text, seen = make_fake(make_schedule()), prompt(), []
    with session("a") if in_session else session_off():
        for call, t in enumerate(TIMESTEPS):
            seen.append(fake(latents(size=4 if call < 4 else 6), t, text))
    assert seen == ["full", "full", "skip", "full", "full", "full", "full", "full"]
    assert sample(fake, text) == (PLAN if in_session else FULL)


def test_resolutions_in_turn(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    for size in (4, 6, 4, 6):
        assert [fake(latents(size=size), t, text) for t in TIMESTEPS] == PLAN


def test_changed_dtype_mid_run(make_fake: Callable[..., Any]) -> None:
    fake, text = make_fake(make_schedule()), prompt()
    for t in TIMESTEPS[:2]:
        fake(latents(), t, text)
    x, t = latents().double(), torch.tensor([TIMESTEPS[2]], dtype=torch.float64)
    assert fake(x, t, text) == "full"


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
