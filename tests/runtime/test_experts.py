"""Pipelines of two denoisers: each is profiled, planned and cached on its part of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt import session, stats
from ditopt.errors import ProfileError, WorkloadError
from ditopt.plan import Cache, Plan
from ditopt.profiling import ProfileSpec, profile
from ditopt.profiling.schema import Costs
from ditopt.workload import Workload, load_workload

from .small_dit import arguments, plan_for, sample, small_dit

TIMES = {"high": (900.0, 800.0, 700.0, 600.0, 500.0, 450.0), "low": (300.0, 200.0, 100.0)}


def experts() -> Workload:
    models = {"high": small_dit(layers=2), "low": small_dit(layers=3)}

    def loop(models: Mapping[str, Any], seed: int) -> Tensor:
        given: dict[str, Any] = arguments(small_dit(), seed=seed)
        for name, times in TIMES.items():
            for t in times:
                (noise,) = sample(models[name], given, [t])
                given["hidden_states"] = given["hidden_states"] - 0.1 * noise
        latents: Tensor = given["hidden_states"]
        return latents

    return Workload(models, loop, name="two experts")


def test_a_profile_is_of_one_denoiser(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"2 denoisers \(high, low\).*workload\.parts"):
        profile(experts(), tmp_path)


def test_parts_run_the_whole_loop_and_hold_one_denoiser() -> None:
    workload = experts()
    parts = workload.parts()
    assert list(parts) == ["high", "low"]
    expected = workload.run(3)
    for name, part in parts.items():
        assert part.model is workload.models[name]
        assert torch.equal(part.run(3), expected)
        calls = part.trace()["model"]
        assert (calls.calls_per_branch, calls.timesteps) == (len(TIMES[name]), TIMES[name])
    one = Workload(workload.models["low"], parts["low"].sample)
    assert one.parts() == {"model": one}


@pytest.mark.slow
def test_each_part_is_profiled_on_its_own_calls(tmp_path: Path) -> None:
    def no_costs(*args: Any) -> Costs:
        return Costs(dense_call_ms=1.0, skip_call_ms=0.1, attention=())

    for name, part in experts().parts().items():
        spec = ProfileSpec(observed_calls=1)
        made = profile(part, tmp_path / name, seeds=1, spec=spec, measure=no_costs)
        assert made.sampler.timesteps == TIMES[name]
        assert len(made.model.sites) == {"high": 2, "low": 3}[name]


def test_plans_of_both_experts_in_one_loop() -> None:
    workload = experts()
    compiled, plans = {}, {}
    for name, model in workload.models.items():
        plans[name] = plan_for(
            model, arguments(model), timesteps=TIMES[name], cache=cache_of(len(TIMES[name]))
        )
    torch.compiler.reset()
    for name, model in workload.models.items():
        options: dict[str, Any] = {"plan": plans[name]}
        compiled[name] = torch.compile(model, backend="ditopt_eager", options=options)
    expected = [workload.run(seed) for seed in range(2)]
    for seed in range(2):
        with session(seed):
            result = workload.run(seed, compiled)
        assert float((result - expected[seed]).abs().max()) < 0.1
        assert not torch.equal(result, expected[seed])
    seen = {name: stats(model)["skipped_steps"] for name, model in workload.models.items()}
    assert seen == {"high": 2 * 2, "low": 2 * 1}
    assert stats(workload.models)["doubts"] == {}


def cache_of(calls: int) -> Cache:
    """The first two calls and then every second one in full, the others on a line."""
    full = [n for n in range(calls) if n < 2 or n % 2]
    rows = {n: (2.0, -1.0) if n == 2 else (1.5, -0.5) for n in range(calls) if n not in full}
    return Cache(full=full, history=2, coefficients=rows)


FILE = """
import torch
from ditopt.workload import Workload

def workload():
    models = {"high": torch.nn.Linear(2, 2).eval(), "low": torch.nn.Linear(2, 2).eval()}
    return Workload(models, lambda models, seed: models["low"](models["high"](torch.ones(2))))
"""


def test_the_command_line_names_a_part(tmp_path: Path) -> None:
    path = tmp_path / "wan.py"
    path.write_text(FILE)
    whole = load_workload(str(path))
    for spec in (f"{path}@low", f"{path}:workload@low"):
        part = load_workload(spec)
        assert list(part.models) == ["model"]
        assert part.title == "Linear: low"
        assert part.origin == f"{whole.origin}@low"
        assert load_workload(part.origin).title == part.title
    with pytest.raises(WorkloadError, match="has no denoiser 'lo'"):
        load_workload(f"{path}@lo")


def test_plans_name_their_parts_model() -> None:
    """A plan of one expert is refused by the other one, whose blocks are others."""
    workload = experts()
    high, low = workload.models.values()
    plan: Plan = plan_for(high, arguments(high))
    torch.compiler.reset()
    wrong = torch.compile(low, backend="ditopt_eager", options={"plan": plan})
    with pytest.raises(Exception, match="another model than this one"):
        sample(wrong, arguments(low))
