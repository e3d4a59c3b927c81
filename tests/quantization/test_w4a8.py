"""Stored weights that are multiplied in 8 bits: exact arithmetic, memory, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ditopt.inspection import explain_fully
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import (
    ROW_FORMATS,
    ROW_SCALE,
    STORED_FORMATS,
    compute,
    derive,
    operands,
)
from ditopt.quantization.rowwise import quantize_rows
from ditopt.quantization.table import totals
from ditopt.workload import Workload

from .small_model import Model, plan_for

STORED = ("int4_group", "twin_log", "int2_group", "twin_log2", "codebook")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rule(**fields: Any) -> LinearRule:
    return LinearRule.model_validate({"format": "int4_group", "activation": "int8_row", **fields})


def layer(one: LinearRule, x: Tensor, weight: Tensor, bias: Tensor, native: bool) -> Tensor:
    n, k = weight.shape
    made = derive(one, [weight], [bias], {"mean": x.mean(0), "amax": x.abs().amax(0)})
    y: Tensor = compute(one, x, made, bias, n=n, k=k, dtype=x.dtype, native=native)
    return y


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("activation", ["int8_row", "fp8_row"])
@settings(max_examples=8, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 7), k=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_product_is_that_of_the_rounded_operands(
    form: str, activation: str, m: int, n: int, k: int, seed: int
) -> None:
    """Against float64: decoded rows in 8 bits times input rows in 8 bits, exact sums."""
    x, weight, bias = draw(m, 16 * k, seed=seed), draw(n, 16 * k, seed=seed + 1), draw(n)
    one, row = rule(format=form, activation=activation), ROW_FORMATS[activation]
    made = derive(one, [weight], [bias], {})
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in made.items()}
    assert shapes == operands(one, n, 16 * k, torch.float32)
    decoded = STORED_FORMATS[form].decode(made, n, 16 * k, torch.float32)
    again = row.encode_again(decoded, made[ROW_SCALE])
    inputs, scale = quantize_rows(x, row.largest, row.dtype)
    left, right = (t.double() for t in (inputs, again["weight"]))
    if activation == "int8_row":
        total = torch._int_mm(inputs, again["weight"].t()).long()
        assert torch.equal(total, inputs.long() @ again["weight"].long().t())
    exact = (left @ right.t()) * scale.double() * again["scale"].double() + bias.double()
    y = layer(one, x, weight, bias, native=activation == "int8_row")
    assert float((y - exact).norm()) <= 1e-5 * float(exact.norm()) + 1e-6


@pytest.mark.parametrize("form", STORED)
def test_rounding_the_decoded_rows_costs_little(form: str) -> None:
    """8 bits of a row lie far below the noise of 4 bits or less."""
    weight = draw(48, 256)
    stored = STORED_FORMATS[form]
    made = derive(rule(format=form), [weight], [], {})
    decoded = stored.decode(made, 48, 256, torch.float32)
    again = ROW_FORMATS["int8_row"].encode_again(decoded, made[ROW_SCALE])
    eight = again["weight"].float() * again["scale"].t()
    assert float((eight - weight).norm()) < 1.01 * float((decoded - weight).norm())
    assert int(again["weight"].abs().amax()) == 127


def test_balance_and_rotation_reach_stored_weights_too() -> None:
    x, weight = draw(256, 256), draw(64, 256, seed=1)
    x[:, :8] *= 200
    weight[:, :8] /= 200
    exact = x.double() @ weight.double().t()
    errors = {}
    for transform in ("none", "balance", "rotate", "rotate_twice"):
        y = layer(rule(transform=transform), x, weight, torch.zeros(64), native=True)
        errors[transform] = float((y - exact).norm() / exact.norm())
    assert errors["none"] > 0.3
    assert max(errors[t] for t in ("balance", "rotate", "rotate_twice")) < 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format": "fp8_row", "activation": "int8_row"},
            "activation 'int8_row' goes with a stored weight; format 'fp8_row' rounds the input",
        ),
        ({"format": "none", "transform": "rotate", "activation": "fp8_row"}, "stored weight"),
        (
            {"format": "twin_log", "transform": "rotate"},
            "'twin_log' rounds the weight alone and takes transform 'none'",
        ),
        ({"format": "int8_row", "calibrated": True}, "only a codebook without a transform"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LinearRule.model_validate(fields)


def held(one: LinearRule, n: int, k: int) -> int:
    parts = operands(one, n, k, torch.bfloat16).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def test_memory_of_a_mixed_assignment() -> None:
    """A DiT-XL/2 block: attention's layers in 4 bits, the MLP's first in 4 and last in 8."""
    four, eight = rule(transform="rotate"), LinearRule(format="int8_row", transform="balance")
    shapes = [(3456, 1152, four), (1152, 1152, four), (4608, 1152, eight), (1152, 4608, four)]
    before = sum(2 * n * k for n, k, _ in shapes)
    assert before / sum(held(one, n, k) for n, k, one in shapes) >= 2.5
    assert 2 * 1152 * 1152 / held(four, 1152, 1152) >= 3.6


X, T = (draw(2, n, 64, seed=n) for n in (33, 1))


@torch.no_grad()
def test_a_compiled_model_tells_what_multiplies() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(blocks=1).eval().requires_grad_(False)
    w4a8 = {"format": "int4_group", "activation": "int8_row"}
    rules: dict[str, Any] = {f"blocks.0.to_{x}": w4a8 for x in "qkv"}
    rules["blocks.0.up"] = {"format": "twin_log", "activation": "fp8_row"}
    rules["blocks.0.down"] = {"format": "twin_log", "activation": "fp8_row", "simulate": True}
    rules["blocks.0.to_out"] = {"format": "int8_row"}
    workload = Workload(model, lambda model, seed: model(X, T[:, 0]))
    found = explain_fully(workload, plan_for(model, rules))
    rows = {row.site.removeprefix("blocks.0."): row for row in found.linears}
    assert {name: row.operator for name, row in rows.items()} == {
        "modulation": "linear",
        **dict.fromkeys(("to_q", "to_k", "to_v"), "decode, then _int_mm"),
        "to_out": "_int_mm",
        "up": "linear",
        "down": "decode, then float32 product (simulated)",
    }
    assert rows["up"].reason.startswith("the CPU has no fp8 matrix product")
    assert rows["to_q"].reason == (
        "int4_group by _int_mm, decoded at every call: smaller, not faster, 3 layers in one"
    )
    # Half a byte a weight, a 16-bit scale for each group of 64 and a float32 scale for each row.
    assert rows["to_q"].bytes_after == 64 * 64 // 2 + 64 * 2 + 64 * 4
    assert totals(found.linears)["ratio"] > 4

    torch._dynamo.reset()
    out = torch.compile(model, backend="ditopt_eager", options={"plan": plan_for(model, rules)})
    truth = model(X, T[:, 0])
    assert 1e-3 < float((out(X, T[:, 0]) - truth).norm() / truth.norm()) < 0.2
