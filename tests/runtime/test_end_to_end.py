"""Plans on a compiled model in every kind of sampling loop, against an oracle without ditopt."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt import invalidate, session, stats
from ditopt.errors import DitoptWarning
from ditopt.plan import Cache, Plan
from ditopt.torch_backend import compiled_graphs

from .oracle import Oracle
from .small_dit import (
    CACHE,
    TIMESTEPS,
    SmallDiT,
    arguments,
    plan_for,
    shared_plan,
    small_dit,
)

SLOW = pytest.mark.slow


class Compiled:
    """A small model, compiled by a plan, beside its oracle."""

    def __init__(
        self, model: SmallDiT | None = None, plan: Plan | None = None, branches: int = 1
    ) -> None:
        self.model = model or small_dit()
        self.plan = plan or shared_plan(branches)
        self.oracle = Oracle(self.model, self.plan.cache or CACHE)
        self.before = stats(self.model)
        torch.compiler.reset()
        self.compiled = torch.compile(
            self.model, backend="ditopt_eager", options={"plan": self.plan}
        )

    def __call__(self, key: Any, call: int, t: float, given: Mapping[str, Any]) -> Tensor:
        """One call, whose result must be the oracle's to rounding, and exact if it is full."""
        given = {**given, "timestep": torch.full_like(given["timestep"], t)}
        with torch.no_grad():
            result = self.compiled(**given)
        expected = self.oracle(key, call, **given)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if call in self.oracle.cache.full:
            assert torch.equal(result, expected)
        return result

    def dense(self, t: float, given: Mapping[str, Any]) -> Tensor:
        """One call whose result must be the model's own, to the bit."""
        given = {**given, "timestep": torch.full_like(given["timestep"], t)}
        with torch.no_grad():
            result = self.compiled(**given)
            assert torch.equal(result, self.model(**given))
        return result

    @property
    def ran(self) -> tuple[int, int]:
        """Full and skipped steps so far."""
        now = stats(self.model)
        return now["full_steps"] - self.before["full_steps"], now["skipped_steps"]

    @property
    def doubts(self) -> dict[str, int]:
        return stats(self.model)["doubts"]


def maybe_session(name: Any, used: bool) -> AbstractContextManager[None]:
    return session(name) if used else nullcontext()


def step(given: dict[str, Any], result: Tensor) -> dict[str, Any]:
    """The next call's arguments; the sampler works in place, on the result, too."""
    latents = given["hidden_states"] - result.mul_(0.1)
    return {**given, "hidden_states": latents}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_and_the_next_one(batch: int) -> None:
    made = Compiled()
    for seed in range(2):
        given = arguments(made.model, seed=seed, batch=batch)
        for call, t in enumerate(TIMESTEPS):
            given = step(given, made(seed, call, t, given))
    assert made.ran == (6, 6)
    assert made.doubts == {}


@pytest.mark.parametrize(
    ("branches", "in_session"), [(2, False), pytest.param(3, True, marks=SLOW)]
)
def test_guidance_one_branch_after_the_other(branches: int, in_session: bool) -> None:
    made = Compiled(branches=branches)
    prompts = [arguments(made.model, seed=n)["encoder_hidden_states"] for n in range(branches)]
    given = arguments(made.model)
    with maybe_session("run", in_session):
        for call, t in enumerate(TIMESTEPS):
            results = [
                made(branch, call, t, {**given, "encoder_hidden_states": text})
                for branch, text in enumerate(prompts)
            ]
            given = step(given, torch.stack(results).mean(0))
    assert made.ran == (3 * branches, 3 * branches)


@pytest.mark.parametrize("in_session", [False, True])
def test_guidance_switched_off_mid_run(in_session: bool) -> None:
    made = Compiled(branches=2)
    prompts = [arguments(made.model, seed=n)["encoder_hidden_states"] for n in range(2)]
    given = arguments(made.model)
    with maybe_session("run", in_session):
        for call, t in enumerate(TIMESTEPS):
            for branch, text in enumerate(prompts[: 1 if call >= 3 else 2]):
                result = made(branch, call, t, {**given, "encoder_hidden_states": text})
            given = step(given, result)
    assert made.ran == (3 + 2, 3 + 1)


def test_guidance_as_a_batch_that_is_halved_mid_run() -> None:
    made = Compiled()
    given = arguments(made.model, batch=2)
    with session("run"):
        for call, t in enumerate(TIMESTEPS[:3]):
            given = step(given, made("both", call, t, given))
        given = {name: value[:1].clone() for name, value in given.items()}
        # Another batch is another set of residuals: 3 is full, 4 and 5 need 3 and 1.
        for t in TIMESTEPS[3:]:
            given = step(given, made.dense(t, given))
    assert made.ran == (5, 1)
    assert made.doubts == {"joined_late": 2}


@pytest.mark.parametrize(
    ("in_session", "delay"), [(False, 1), pytest.param(True, 0, marks=SLOW), (True, 3)]
)
def test_interleaved_requests(in_session: bool, delay: int) -> None:
    made = Compiled()
    given = {name: arguments(made.model, seed=n) for n, name in enumerate("ab")}
    for tick in range(len(TIMESTEPS) + delay):
        for name, call in (("a", tick), ("b", tick - delay)):
            if 0 <= call < len(TIMESTEPS):
                with maybe_session(name, in_session):
                    result = made(name, call, TIMESTEPS[call], given[name])
                given[name] = step(given[name], result)
    assert made.ran == (6, 6)


def test_heun_calls_twice_a_step() -> None:
    times = (900.0, 700.0, 700.0, 450.0, 450.0, 200.0, 200.0)
    cache = Cache(full=(0, 1, 2, 4), history=2, coefficients=dict.fromkeys((3, 5, 6), (1.5, -0.5)))
    model = small_dit()
    made = Compiled(model, plan_for(model, arguments(model), timesteps=times, cache=cache))
    for seed in range(2):
        given = arguments(made.model, seed=seed)
        for call, t in enumerate(times):
            given = step(given, made(seed, call, t, given))
    assert made.ran == (8, 6)


def test_two_experts_each_with_its_part_of_the_trajectory() -> None:
    """As Wan2.2: one model down to the boundary, the other one from there on."""
    early, late = TIMESTEPS, tuple(t / 8 for t in TIMESTEPS)
    high = Compiled()
    low_model = small_dit(layers=3)
    low_plan = plan_for(low_model, arguments(low_model), timesteps=late)
    compile_again = torch.compile(high.model, backend="ditopt_eager", options={"plan": high.plan})
    low = Compiled(low_model, low_plan)  # resets Dynamo, hence the other one again
    high.compiled = compile_again
    requests = {name: arguments(high.model, seed=n) for n, name in enumerate("ab")}
    for name, given in requests.items():
        with session(name):
            for expert, times in ((high, early), (low, late)):
                for call, t in enumerate(times):
                    given = step(given, expert(name, call, t, given))
    assert high.ran == low.ran == (6, 6)
    both = stats({"high": high.model, "low": low.model})
    assert (both["skipped_steps"], both["doubts"]) == (12, {})


# ---------------------------------------------------------------------------- other loops


@pytest.mark.parametrize("in_session", [False, True])
def test_another_number_of_steps_is_full_with_one_warning(in_session: bool) -> None:
    made = Compiled()
    times = [1000 * (1 - n / 4) for n in range(4)]

    def run() -> None:
        for seed in range(2):
            given = arguments(made.model, seed=seed)
            with maybe_session(seed, in_session):
                for t in times:
                    given = step(given, made.dense(t, given))

    with pytest.warns(DitoptWarning, match="every step in full") as caught:
        run()
    assert len(caught) == 1
    assert made.ran == (8, 0)
    given = arguments(made.model, seed=7)
    for call, t in enumerate(TIMESTEPS):
        given = step(given, made("planned", call, t, given))
    assert made.ran == (11, 3)


def test_resolution_changed_in_mid_run_and_between_runs() -> None:
    made = Compiled()
    small, wide = arguments(made.model), arguments(made.model, seed=1, size=(8, 12))
    with session("growing"):
        for call, t in enumerate(TIMESTEPS[:3]):
            made("small", call, t, small)
        for t in TIMESTEPS[3:]:
            made.dense(t, wide)
    assert made.ran == (5, 1)
    for key, given in (("wide", wide), ("small again", small), ("wide again", wide)):
        for call, t in enumerate(TIMESTEPS):
            made(key, call, t, given)
    assert made.ran == (5 + 9, 1 + 9)


def test_inference_mode_in_a_session() -> None:
    with torch.inference_mode():
        made = Compiled()
        given = arguments(made.model)
        with session("run"):
            for call, t in enumerate(TIMESTEPS):
                given = step(given, made("run", call, t, given))
        assert made.ran == (3, 3)
        with pytest.warns(DitoptWarning, match="inference tensors"):
            made.dense(TIMESTEPS[0], given)
        made.dense(TIMESTEPS[1], given)


# ---------------------------------------------------------------------------- ControlNet


def residuals_for(model: SmallDiT, call: int, tokens: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + call // 2)
    width = model.out.in_features
    return [torch.randn(1, tokens, width, generator=generator) / 8 for _ in model.blocks]


def controlled(made: Compiled, name: str, call: int, t: float, given: Any) -> Tensor:
    return made(name, call, t, {**given, "residuals": residuals_for(made.model, call)})


def test_control_residuals_that_the_plan_does_not_know_run_in_full() -> None:
    made = Compiled()
    given = arguments(made.model)

    def run() -> None:
        for call, t in enumerate(TIMESTEPS):
            made.dense(t, {**given, "residuals": residuals_for(made.model, call)})

    with pytest.warns(DitoptWarning, match="not recognised as one"):
        run()
    assert made.ran == (6, 0)
    # One run with them must not serve the next one without.
    for call, t in enumerate(TIMESTEPS):
        given = step(given, made("without", call, t, given))


def test_control_residuals_that_the_plan_knows_are_forecast_and_a_decision_says_so() -> None:
    model = small_dit()
    given = arguments(model)
    names = [f"residuals.{n}" for n in range(4)]
    plan = plan_for(
        model,
        {**given, "residuals": residuals_for(model, 0)},
        varying=("hidden_states", "timestep", *names),
    )
    made = Compiled(model, plan)
    for call, t in enumerate(TIMESTEPS):
        given = step(given, controlled(made, "run", call, t, given))
    assert made.ran == (3, 3)
    told = [d.reason for d in compiled_graphs(model)[-1].decisions if d.rule == "cache_inputs"]
    assert told == [
        "residuals.0, residuals.1 and 1 more change from call to call and enter inside these "
        "blocks: a skipped call forecasts their effect from earlier calls"
    ]


def test_control_switched_off_mid_run_forecasts_nothing_of_it() -> None:
    model = small_dit()
    given = arguments(model)
    names = [f"residuals.{n}" for n in range(4)]
    plan = plan_for(
        model,
        {**given, "residuals": residuals_for(model, 0)},
        varying=("hidden_states", "timestep", *names),
    )
    made = Compiled(model, plan)
    for call, t in enumerate(TIMESTEPS[:3]):
        given = step(given, controlled(made, "run", call, t, given))
    for t in TIMESTEPS[3:]:  # without them it is another graph, with residuals of its own
        given = step(given, made.dense(t, given))
    assert made.ran == (5, 1)


# ---------------------------------------------------------------------------- weights


def merge(model: nn.Module, how: str) -> None:
    """What LoRA tools do to weights."""
    down = model.blocks[2].down
    with torch.no_grad():
        if how == "one_in_place":
            down.weight += 0.3
        elif how == "one_fused":  # part of a merged projection
            model.blocks[1].to_k.weight *= 2
        elif how == "one_replaced":
            down.weight = nn.Parameter(down.weight + 0.3, requires_grad=False)
        elif how == "data_replaced":
            down.weight.data = down.weight + 0.3
        elif how == "without_a_trace":
            down.weight.data.add_(0.3)
            model.blocks[1].to_k.weight.data.mul_(2)
            invalidate(model)
        elif how == "all_assigned":
            state = {name: value * 1.2 for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
            model.requires_grad_(False)
        else:
            raise AssertionError(how)


SWAPS = ["one_in_place", "one_fused", "data_replaced", "without_a_trace", "all_assigned"]


@pytest.mark.parametrize("how", [*SWAPS, pytest.param("one_replaced", marks=SLOW)])
def test_weights_swapped_in_mid_run(how: str) -> None:
    made = Compiled()
    given = arguments(made.model)
    for call, t in enumerate(TIMESTEPS[:3]):
        given = step(given, made("run", call, t, given))
    merge(made.model, how)
    for t in TIMESTEPS[3:]:
        given = step(given, made.dense(t, given))
    assert made.ran == (5, 1)
    assert made.doubts == {"weights_changed": 2}
    for call, t in enumerate(TIMESTEPS):
        given = step(given, made("next", call, t, given))
    assert made.ran == (8, 4)


def test_swapped_weights_can_be_declared_again() -> None:
    """`invalidate` and `stats` find a model of which no parameter is the original one."""
    made = Compiled()
    given = arguments(made.model)
    made.dense(TIMESTEPS[0], given)
    merge(made.model, "all_assigned")
    made.dense(TIMESTEPS[0], given)
    merge(made.model, "without_a_trace")
    made.dense(TIMESTEPS[0], given)
    assert made.ran == (3, 0)


# ---------------------------------------------------------------------------- exceptions


class Breaks(nn.Module):
    """Passes its input on; raises once when told so, inside the compiled graph."""

    fail = False

    def forward(self, x: Tensor) -> Tensor:
        return maybe_fail(x)


@torch.library.custom_op("ditopt_test::maybe_fail", mutates_args=())
def maybe_fail(x: Tensor) -> Tensor:
    """The input; or, once, an error as a device raises it."""
    if Breaks.fail:
        Breaks.fail = False
        raise RuntimeError("out of memory")
    return x.clone()


maybe_fail.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("failing", "in_session"), [pytest.param(0, True, marks=SLOW), (1, False), (3, True)]
)
def test_an_exception_in_mid_run(failing: int, in_session: bool) -> None:
    model = small_dit()
    model.blocks[1].norm = nn.Sequential(model.blocks[1].norm, Breaks())
    made = Compiled(model, plan_for(model, arguments(model)))
    given = arguments(model)

    def run(name: str, fails: int | None) -> None:
        now = dict(given)
        with maybe_session("run", in_session):
            for call, t in enumerate(TIMESTEPS):
                Breaks.fail = call == fails
                now = step(now, made(name, call, t, now))

    with pytest.raises(RuntimeError, match="out of memory"):
        run("broken", failing)
    assert made.ran[0] == min(failing, 2)
    run("again", None)
    assert made.ran == (min(failing, 2) + 3, 3 + (failing == 3))


def test_a_run_given_up_by_the_caller() -> None:
    made = Compiled()
    given = arguments(made.model)

    def interrupted() -> None:
        with session("run"):
            for call, t in enumerate(TIMESTEPS[:4]):
                made("interrupted", call, t, given)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with session("run"):
        for call, t in enumerate(TIMESTEPS):
            made("again", call, t, given)
    assert made.ran == (6, 4)
