"""Errors of formats by layer and timestep range, and what the search makes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.errors import ProfileError
from ditopt.profiling.linears import (
    CANDIDATES,
    LinearCost,
    LinearProfile,
    load_statistics,
    measure_linear_costs,
    profile_linears,
)
from ditopt.profiling.schema import SeedRecord
from ditopt.quantization import LinearRule
from ditopt.quantization.statistics import InputStatistics
from ditopt.search.assignment import Limits, evaluate, solve
from ditopt.search.linears import LinearChoices
from ditopt.workload import Workload

from .small_model import Model

CALLS = 4


class Loop(nn.Module):
    """The model with a timestep input, and one channel of `down`'s input made salient."""

    def __init__(self, salient: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Model(blocks=2)
        if salient:
            block = self.inner.blocks[1]
            block.up.weight.data[:4] *= 100
            block.up.bias.data[:4] *= 100
            block.down.weight.data[:, :4] /= 100

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        t = timestep[:, None] * torch.linspace(0, 1, 64) / 100
        return self.inner(hidden_states, t)


def workload(salient: bool = True) -> Workload:
    def sample(model: Any, seed: int) -> Tensor:
        x = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(seed))
        for t in torch.linspace(100, 10, CALLS):
            x = x - 0.1 * model(hidden_states=x, timestep=t[None])
        return x

    return Workload(Loop(salient).eval().requires_grad_(False), sample)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[LinearProfile, Path]:
    folder = tmp_path_factory.mktemp("linears")
    profile = profile_linears(workload(), folder, ranges=2, rows=64, min_rows=8, measure=halved)
    return profile, folder


def halved(shapes: Any, formats: Any, device: Any, dtype: Any) -> tuple[LinearCost, ...]:
    """A device that multiplies int8 alone, in half the time."""
    assert (formats, dtype) == (["fp8_row", "int8_row"], torch.float32)
    return tuple(LinearCost(shape=s, plain_ms=1.0, format_ms={"int8_row": 0.5}) for s in shapes)


def test_layers_of_one_tensor_are_one_group(found: tuple[LinearProfile, Path]) -> None:
    profile, folder = found
    names = [[m.removeprefix("inner.blocks.") for m in g.members] for g in profile.groups]
    one = [["{}.to_q", "{}.to_k", "{}.to_v"], ["{}.to_out"], ["{}.up"], ["{}.down"]]
    assert names == [[m.format(b) for m in g] for b in (0, 1) for g in one]
    assert profile.groups[0].shape == (48, 64, 192)
    assert profile.ranges == ((0, 2), (2, 4))
    assert LinearProfile.load(folder) == profile
    assert LinearProfile.load(folder / "elsewhere") is None


def test_the_planted_layer_is_the_most_sensitive(found: tuple[LinearProfile, Path]) -> None:
    profile, _ = found
    rule = {(r.format, r.transform): k for k, r in enumerate(CANDIDATES)}
    int8, balanced = rule["int8_row", "none"], rule["int8_row", "balance"]
    worst = max(profile.groups, key=lambda group: max(group.error[int8]))
    assert worst.members == ("inner.blocks.1.down",)
    assert max(worst.error[balanced]) < max(worst.error[int8]) / 20
    assert worst.outliers["incoherence"] > 8
    fp8 = rule["fp8_row", "none"]
    assert all(1e-4 < error < 4e-3 for g in profile.groups for error in g.error[fp8])


def test_statistics_are_kept_for_every_member(found: tuple[LinearProfile, Path]) -> None:
    profile, folder = found
    tensors = load_statistics(folder)
    for group in profile.groups:
        for member in group.members:
            assert tensors[f"linear/mean/{member}"].shape == (group.in_features,)


def test_the_device_decides_what_is_offered(found: tuple[LinearProfile, Path]) -> None:
    profile, _ = found
    assert "fp8_row is not offered: the CPU has no fp8 matrix product" in profile.notes
    assert {cost.shape for cost in profile.costs} == {group.shape for group in profile.groups}


@pytest.mark.slow
def test_times_are_measured() -> None:
    formats = ["fp8_row", "int8_row"]
    (cost,) = measure_linear_costs([(64, 32, 48)], formats, torch.device("cpu"), torch.float32)
    assert cost.plain_ms > 0
    assert set(cost.format_ms) == {"int8_row"}


@pytest.mark.slow
def test_no_shape_is_timed_in_eager_mode() -> None:
    """Dynamo counts all shapes together and gives up at its limit, which the patch makes loud."""
    shapes = [(64, 32, 16 * n) for n in range(1, 11)]
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = measure_linear_costs(shapes, ["int8_row"], torch.device("cpu"), torch.float32)
    assert [cost.shape for cost in found] == shapes


def seed_record() -> SeedRecord:
    steps = torch.ones(CALLS, dtype=torch.float64)
    return SeedRecord(
        squared_error={},
        squared_norm={},
        gram=torch.eye(CALLS),
        hidden_energy=steps,
        step_energy=steps,
    )


def test_the_search_takes_cheap_errors_first(found: tuple[LinearProfile, Path]) -> None:
    profile, folder = found
    choices = LinearChoices(profile, load_statistics(folder), [seed_record()], torch.float32)
    sites = choices.sites()
    assert len(sites) == 8
    assert {site.first_call for site in sites} == {0}
    free = solve(sites, "ms", Limits(error=math.inf))
    assert free is not None
    assert free.ms == pytest.approx(4.0)
    half = solve(sites, "ms", Limits(error=free.error / 2))
    assert half is not None
    assert 4.0 < half.ms < 8.0
    assert half.error <= free.error / 2
    exact = solve(sites, "error", Limits(ms=4.0))
    assert exact is not None
    rules = choices.rules(exact.choices, sites)
    assert len(rules) == 2 * 6
    assert {rule.format for rule in rules.values()} == {"int8_row"}
    # Balance costs nothing more here, and the salient layer needs it.
    assert rules["inner.blocks.1.down"].transform == "balance"
    assert {rules[f"inner.blocks.0.to_{x}"] for x in "qkv"} == {rules["inner.blocks.0.to_q"]}
    balanced = {layer for layer, rule in rules.items() if rule.transform != "none"}
    assert {key.partition("/")[2].partition("/")[2] for key in choices.tensors(rules)} == balanced
    static = {"inner.blocks.1.down": LinearRule(format="int8_row", static=0)}
    assert "linear/range_amax/inner.blocks.1.down" in choices.tensors(static)


def test_a_format_that_is_not_faster_is_never_offered(found: tuple[LinearProfile, Path]) -> None:
    profile, folder = found
    slow = [
        LinearCost(shape=c.shape, plain_ms=1.0, format_ms={"int8_row": 1.1}) for c in profile.costs
    ]
    changed = profile.model_copy(update={"costs": tuple(slow)})
    choices = LinearChoices(changed, load_statistics(folder), [seed_record()], torch.int8)
    assert choices.sites() == []


def test_a_format_that_is_smaller_is_offered_although_it_is_slower(
    found: tuple[LinearProfile, Path],
) -> None:
    profile, folder = found
    slow = [
        LinearCost(shape=c.shape, plain_ms=1.0, format_ms={"int8_row": 1.1}) for c in profile.costs
    ]
    changed = profile.model_copy(update={"costs": tuple(slow)})
    choices = LinearChoices(changed, load_statistics(folder), [seed_record()], torch.float32)
    sites = choices.sites()
    as_is = evaluate(sites, {})
    assert as_is.bytes == choices.plain_bytes
    found_ = solve(sites, "ms", Limits(bytes=as_is.bytes * 0.5))
    assert found_ is not None
    assert found_.bytes <= as_is.bytes * 0.5
    assert as_is.ms < found_.ms < 1.1 * as_is.ms


def test_a_damaged_file_is_refused(found: tuple[LinearProfile, Path], tmp_path: Path) -> None:
    (tmp_path / "linears.json").write_text('{"weights": 3}')
    with pytest.raises(ProfileError, match=r"linears.json: "):
        LinearProfile.load(tmp_path)


def test_outliers_of_a_known_input() -> None:
    seen = InputStatistics.empty(16, torch.device("cpu"))
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) + 3
    x[:, 5] *= 40
    seen.add(x[:256])
    seen.add(x[256:])
    outliers = seen.outliers()
    assert torch.allclose(seen.mean, x.double().mean(0))
    assert 8 < outliers["incoherence"] < 16
    assert outliers["dc_ratio"] > 0.9
    assert outliers["top8_energy"] > 0.98
    assert outliers["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
