"""From a profile with linear layers to a plan that names formats, and the model under that plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ditopt.plan import Goal, Plan
from ditopt.profiling import Profile, profile
from ditopt.profiling.linears import LinearCost, profile_linears
from ditopt.profiling.schema import AttentionCost, Costs
from ditopt.search import Measured, plan_from_profile
from ditopt.torch_backend import compiled_graphs

from .test_sensitivity import workload


def costs(workload: Any, profile: Profile, progress: Any) -> Costs:
    """Sparse attention and skipped calls gain nothing, so formats are all there is to choose."""
    attention = tuple(
        AttentionCost(shape=shape, dense_ms=0.1, sparse_ms=((1.0, 0.2), (0.1, 0.2)))
        for shape in set(profile.shapes.values())
    )
    return Costs(dense_call_ms=20.0, skip_call_ms=20.0, attention=attention)


def halved(shapes: Any, formats: Any, device: Any, dtype: Any) -> tuple[LinearCost, ...]:
    return tuple(LinearCost(shape=s, plain_ms=2.0, format_ms={"int8_row": 1.0}) for s in shapes)


class Sampler:
    """A loop as fast as predicted, of a quality that falls with the number of rounded layers."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def __call__(self, plan: Plan, seeds: Sequence[int]) -> list[Measured]:
        self.plans.append(plan)
        assert plan.predicted is not None
        count = len(plan.phases[-1].linear)
        return [Measured(60.0 - count, plan.predicted.seconds) for _ in seeds]


@torch.no_grad()
def test_the_search_names_formats(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = workload()
    profile(model, tmp_path, seeds=1, measure=costs)
    profile_linears(model, tmp_path, ranges=2, rows=64, min_rows=8, measure=halved)
    path = tmp_path / "plan.yaml"
    goal = Goal(target_speedup=1.2)
    found = plan_from_profile(tmp_path, goal, path, workload=model, verify=Sampler())
    (last,) = found.phases  # formats hold at every call
    assert last.linear
    assert {rule.format for rule in last.linear.values()} == {"int8_row"}
    assert "fp8_row is not offered: the CPU has no fp8 matrix product" in found.assumptions
    loaded = Plan.load(path)
    assert loaded == found.model_copy(update={"side_file": loaded.side_file})
    needing = {layer for layer, rule in last.linear.items() if rule.transform == "balance"}
    assert {key.rpartition("/")[2] for key in loaded.tensors} == needing

    torch._dynamo.reset()
    (denoiser,) = model.models.values()
    run = torch.compile(denoiser, backend="ditopt_eager", options={"plan": path})
    result = model.run(7, dict.fromkeys(model.models, run))
    exact = model.run(7, model.models)
    assert 0 < float((result - exact).norm() / exact.norm()) < 0.02
    told = [d for d in compiled_graphs(denoiser)[-1].decisions if d.rule == "quantize_linears"]
    assert {d.site for d in told if d.applied} == set(last.linear)
