"""Rules about linear layers in a plan: round trip, and refusals that name the field."""

from typing import Any

import pytest
import yaml

from ditopt.errors import PlanError
from ditopt.plan import Plan
from ditopt.quantization import LinearRule


def document(linear: dict[str, Any]) -> str:
    return yaml.safe_dump(
        {
            "ditopt_plan": 1,
            "model": {
                "architecture": "a" * 64,
                "weights": "b" * 64,
                "name": "Model",
                "sites": [],
                "linears": [
                    {"id": f"blocks.{n}.ff.0", "in_features": 32, "out_features": 128}
                    for n in (2, 10)
                ],
            },
            "sampler": {
                "calls": 2,
                "branches": 1,
                "timestep": None,
                "timesteps": [],
                "varying": [],
            },
            "hardware": {"device": "cpu", "name": "a CPU", "torch": "2.13.0", "threads": 2},
            "phases": [{"calls": [0, 1]}, {"calls": [1, 2], "linear": linear}],
        }
    )


RULES = {
    "blocks.10.ff.0": {"format": "int8_row", "transform": "balance"},
    "blocks.2.ff.0": {"format": "fp8_row", "simulate": True},
}


def test_rules_survive_a_round_trip_in_natural_order() -> None:
    plan = Plan.from_text(document(RULES))
    assert plan.phases[0].linear == {}
    assert list(plan.phases[1].linear) == ["blocks.2.ff.0", "blocks.10.ff.0"]
    assert plan.phases[1].linear["blocks.2.ff.0"] == LinearRule(format="fp8_row", simulate=True)
    assert Plan.from_text(plan.to_text()) == plan


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"format": "fp9_row"}, r"linear\.blocks\.2\.ff\.0\.format: .*'fp8_row'.*got 'fp9_row'"),
        ({"format": "fp8_row", "bits": 8}, r"linear\.blocks\.2\.ff\.0\.bits: unknown key"),
        ({"transform": "centre"}, r"blocks\.2\.ff\.0\.format: missing"),
        ({"format": "fp8_row", "transform": "spin"}, r"transform: .*'rotate'.*got 'spin'"),
        (
            {"format": "codebook", "transform": "balance"},
            "format 'codebook' rounds the weight alone and takes transform 'none'",
        ),
    ],
)
def test_a_bad_rule_is_refused_by_name(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_text(document({"blocks.2.ff.0": rule}))


def test_a_rule_for_an_unknown_layer_names_the_closest() -> None:
    with pytest.raises(
        PlanError, match=r"phases\[1\].linear\['blocks.2.ff.1'\]: no such site"
    ) as e:
        Plan.from_text(document({"blocks.2.ff.1": {"format": "fp8_row"}}))
    assert "blocks.2.ff.0" in str(e.value)


def test_an_id_stands_once() -> None:
    twice = document({}).replace("blocks.10.ff.0", "blocks.2.ff.0")
    with pytest.raises(PlanError, match=r"model\.linears: an id stands twice"):
        Plan.from_text(twice)
