"""Scales that are known beforehand: arithmetic, clipping, refusals, a compiled plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ditopt.quantization import LinearRule
from ditopt.quantization.layer import INPUT_AMAX, compute, derive, operands
from ditopt.quantization.rowwise import FP8_ROW, INT8_ROW, RowFormat, quantize_by, quantize_rows
from ditopt.torch_backend import compiled_graphs

from .small_model import Model, plan_for

X, T = (torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (33, 1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", [FP8_ROW, INT8_ROW], ids=lambda f: f.name)
def test_one_row_is_rounded_alike_by_its_own_magnitude(form: RowFormat) -> None:
    x = draw(1, 40)
    amax = x.abs().amax().reshape(1, 1)
    numbers, scale = quantize_by(x, amax, form.largest, form.dtype)
    same, own = quantize_rows(x, form.largest, form.dtype)
    assert torch.equal(numbers.float(), same.float())
    torch.testing.assert_close(scale, own)


@pytest.mark.parametrize("form", [FP8_ROW, INT8_ROW], ids=lambda f: f.name)
def test_what_is_larger_is_clipped(form: RowFormat) -> None:
    x = torch.tensor([[0.5, -0.25], [8.0, -9.0]])
    numbers, scale = quantize_by(x, torch.ones(1, 1), form.largest, form.dtype)
    assert scale.shape == (2, 1)
    torch.testing.assert_close(numbers.float() * scale, x.clamp(-1, 1), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("transform", ["none", "balance"])
@pytest.mark.parametrize("fields", [{"format": "int8_row"}, {"format": "int4_group"}])
def test_the_product_is_that_of_the_rounded_operands(transform: str, fields: Any) -> None:
    if fields["format"] == "int4_group":
        fields = {**fields, "activation": "int8_row"}
    x, weight, bias = draw(9, 64), draw(11, 64, seed=1), draw(11, seed=2)
    x[:, :4] *= 30
    seen = torch.stack([x.abs().amax(0), 10 * x.abs().amax(0)])
    statistics = {"amax": seen[0], "range_amax": seen}
    sizes: dict[str, Any] = {"n": 11, "k": 64, "dtype": torch.float32, "native": True}
    exact, errors = x.double() @ weight.double().t() + bias, []
    for static in (0, 1):
        rule = LinearRule.model_validate({**fields, "transform": transform, "static": static})
        made = derive(rule, [weight], [bias], statistics)
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in made.items()}
        assert shapes == operands(rule, 11, 64, torch.float32)
        moved = x * made["stretch"] if transform == "balance" else x
        own = moved.abs().amax() * (10 if static else 1)
        torch.testing.assert_close(made[INPUT_AMAX], own.reshape(1, 1))
        y = compute(rule, x, made, bias, **sizes)
        errors.append(float((y - exact).norm() / exact.norm()))
    assert errors[0] < 0.2
    assert errors[1] > errors[0]  # a range ten times too wide wastes steps


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int4_group"},
        {"format": "int8_row", "transform": "rotate"},
        {"format": "int8_row", "transform": "centre"},
    ],
)
def test_rules_that_cannot_be_static(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="static scales are of 8-bit inputs"):
        LinearRule.model_validate({**fields, "static": 0})


@torch.no_grad()
def test_a_plan_says_which_range(tmp_path: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(blocks=1).eval().requires_grad_(False)
    rules = {f"blocks.0.{name}": {"format": "int8_row", "static": 0} for name in ("up", "down")}
    rules["blocks.0.to_out"] = {"format": "int8_row", "static": 2}
    statistics = {
        "linear/range_amax/blocks.0.up": torch.full((2, 64), 6.0),
        "linear/range_amax/blocks.0.to_out": torch.full((2, 64), 6.0),
    }
    plan = plan_for(model, rules, statistics=statistics)
    run = torch.compile(model, backend="ditopt_eager", options={"plan": plan})
    out, truth = run(X, T[:, 0]), model(X, T[:, 0])
    assert 1e-4 < float((out - truth).norm() / truth.norm()) < 0.02
    decisions = compiled_graphs(model)[-1].decisions
    assert {d.site: d.reason for d in decisions if d.rule == "quantize_linears"} == {
        "blocks.0.up": "int8_row by _int_mm, input by the static scale of range 0",
        "blocks.0.down": "range 0 of the statistic 'range_amax' [ranges, 128] is missing",
        "blocks.0.to_out": "range 2 of the statistic 'range_amax' [ranges, 64] is missing",
    }
