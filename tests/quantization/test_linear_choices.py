"""Reasons against a rule that are known before the graph is rewritten."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.errors import WeightError
from ditopt.linear_choices import linear_choices, statistics_of
from ditopt.quantization import LinearRule
from ditopt.sites import LinearSite

RULE = LinearRule(format="int8_row")


class Foreign(Tensor):
    """A weight that another library rounded: a subclass that hides its numbers."""


def choose(weight: Any, *, slot: int | None = 0, prefix: str = "", pieces: int = 1) -> Any:
    captured: Any = SimpleNamespace(
        prefix=prefix, pieces=[SimpleNamespace(inputs=(0,)) for _ in range(pieces)]
    )
    site = LinearSite("layer", 4, 4, 0, "linear", slot, 8)
    return linear_choices(captured, [site], [weight], {"layer": RULE}, {})["layer"]


def test_a_plain_parameter_is_taken() -> None:
    assert choose(nn.Parameter(torch.ones(4, 4))) == RULE


@pytest.mark.parametrize(
    ("weight", "changes", "reason"),
    [
        (
            torch.ones(4, 4).as_subclass(Foreign),
            {},
            "the weight is a Foreign, quantized by another library already",
        ),
        (torch.ones(4, 4, dtype=torch.int8), {}, "the weight is int8 already"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), {}, "the weight is float8_e4m3fn already"),
        (torch.full((4, 4), torch.inf), {}, "the weight holds NaN or infinity"),
        (torch.ones(4, 4), {"slot": None}, "its weight is computed, not a parameter"),
        (
            torch.ones(4, 4),
            {"pieces": 2},
            "the weight is tied: another operator reads it too",
        ),
        (
            torch.ones(4, 4),
            {"prefix": "blocks.0"},
            "a graph break makes blocks.0 a graph of its own, which equal modules share",
        ),
    ],
    ids=["subclass", "int8", "fp8", "inf", "computed", "tied", "graph break"],
)
def test_reasons(weight: Tensor, changes: dict[str, Any], reason: str) -> None:
    assert choose(weight, **changes) == reason


def test_a_released_weight_is_an_error() -> None:
    weight = torch.ones(4, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(WeightError, match="was let go by an earlier compilation"):
        choose(weight)


def test_layers_that_the_plan_does_not_name_are_passed_over() -> None:
    captured: Any = SimpleNamespace(prefix="", pieces=[SimpleNamespace(inputs=(0,))])
    site = LinearSite("layer", 4, 4, 0, "linear", 0, 8)
    assert linear_choices(captured, [site], [torch.ones(4, 4)], {}, {}) == {}


def test_statistics_are_sorted_by_layer() -> None:
    tensors = {
        "linear/mean/a.b": torch.ones(2),
        "linear/amax/a.b": torch.ones(3),
        "other": torch.ones(1),
    }
    found = statistics_of(tensors)
    assert set(found) == {"a.b"}
    assert {name: len(value) for name, value in found["a.b"].items()} == {"mean": 2, "amax": 3}
