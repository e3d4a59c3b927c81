"""Every way in which sampling loops call a denoiser; a skip must never use another run's residual.

The plan below has 8 calls: F F S F S F S F, and skips extrapolate linearly or reuse.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ditopt.errors import DitoptWarning
from ditopt.runtime import StepSchedule, session

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
    session_off,
)


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
