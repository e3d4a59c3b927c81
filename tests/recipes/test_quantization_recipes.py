"""Quantization recipes: each is the plan that its paper's rule gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from ditopt.errors import PlanError
from ditopt.plan import Block, Hardware, ModelRecord, Plan, Sampler, SiteRecord
from ditopt.profiling.linears import LinearGroup, LinearProfile
from ditopt.profiling.schema import AttentionOption, Profile, SiteShape
from ditopt.quantization.layer import operands
from ditopt.recipes import QuantizationRecipe, quantization_recipe_names
from ditopt.recipes.quantization.base import Ground
from ditopt.recipes.quantization.budget import Unit, raised

CALLS, RANGES = 20, ((0, 5), (5, 10), (10, 15), (15, 20))
NAMES = ("lrq_dit", "vidit_q", "vq4dit")
BLOCKS = 3
ROLES = {"attn1.to_q": "self", "attn2.to_q": "cross", "ff.0": "ff", "ff.2": "ff"}


def profile() -> Profile:
    kinds: dict[str, Any] = {"attn1": "self", "attn2": "cross"}
    sites = tuple(
        SiteRecord(id=f"blocks.{b}.{name}#0", kind=kind, heads=2, head_dim=128)
        for b in range(BLOCKS)
        for name, kind in kinds.items()
    )
    shape = SiteShape(batch=1, heads=2, tokens=64, head_dim=128, dtype="float32")
    return Profile(
        model=ModelRecord(architecture="a" * 64, weights="b" * 64, name="Model", sites=sites),
        sampler=Sampler(calls=CALLS),
        hardware=Hardware(device="cpu", name="a CPU", torch="2.13.0", threads=2),
        layout=None,
        block=Block(q=64, k=64),
        options=(AttentionOption.model_validate({"pattern": {"kind": "dense"}}),),
        shapes={site.id: shape for site in sites},
        observed_calls=(0,),
        data_range=2.0,
        seeds=(0,),
        finished=(0,),
    )


def layers(**changes: Any) -> LinearProfile:
    """Groups of 512 x 512; errors grow with the range, and 4 bits lose 100 times what 8 lose."""
    rules = QuantizationRecipe.load("vidit_q").candidates()
    groups = []
    for block in range(BLOCKS):
        for name, role in ROLES.items():
            size = (block + 1) * (2 if role == "ff" else 1)
            lost = [tuple(1e-4 * size * (r + 1) for r in range(4)), (1e-6,) * 4]
            groups.append(
                LinearGroup(
                    members=(f"blocks.{block}.{name}",),
                    rows=64,
                    in_features=512,
                    out_features=(512,),
                    error=tuple(lost),
                    # Backwards, so that a role judged by it is served in another order.
                    direction_error=tuple(row[::-1] for row in lost),
                    outliers={"fluctuation": 0.4 * (block + 1)},
                    range_amax=(1.0,) * 4,
                )
            )
    fields = {"weights": "b" * 64, "rules": rules, "ranges": RANGES, "groups": tuple(groups)}
    return LinearProfile(**{**fields, **changes})


def tensors(found: LinearProfile) -> dict[str, torch.Tensor]:
    """As `load_statistics` and `calibrate` give them; only names are read here."""
    names = ("amax", "mean", "codes", "words", "scale", "checksum")
    return {f"linear/{name}/{r.id}": torch.ones(2) for name in names for r in found.records}


def made(name: str, setting: dict[str, Any] | None = None) -> Plan:
    found = layers()
    return QuantizationRecipe.load(name).plan(profile(), found, setting, tensors=tensors(found))


def mean_bits(plan: Plan) -> float:
    """Of a weight, over calls, everything that belongs to it included."""
    total = 0.0
    for phase in plan.phases:
        for rule in phase.linear.values():
            parts = operands(rule, 512, 512, torch.bfloat16).values()
            held = sum(torch.Size(s).numel() * d.itemsize for s, d in parts)
            total += (phase.calls[1] - phase.calls[0]) * 8 * held / 512**2
    return total / CALLS / len(layers().records)


def test_the_recipes_ship_and_cite() -> None:
    assert quantization_recipe_names() == NAMES
    for name in NAMES:
        recipe = QuantizationRecipe.load(name)
        assert recipe.differs
        assert recipe.paper.where


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_gives_a_plan_that_survives_a_round_trip(name: str) -> None:
    recipe, found = QuantizationRecipe.load(name), layers()
    for setting in recipe.settings():
        rules = recipe.candidates(setting)
        plan = recipe.plan(profile(), layers(rules=rules), setting, tensors=tensors(found))
        assert Plan.from_text(plan.to_text()) == plan
        assert {rule for phase in plan.phases for rule in phase.linear.values()} <= set(rules)
        assert recipe.name in plan.assumptions[0]
        assert plan.cache is None


@pytest.mark.parametrize("bits", [5, 6.4, 7])
@pytest.mark.parametrize("per_range", [True, False])
def test_vidit_q_spends_its_budget(bits: float, per_range: bool) -> None:
    plan = made("vidit_q", {"mean_bits": bits, "per_range": per_range})
    one_layer = 4 * (1 if per_range else 4) / (4 * len(layers().records))
    assert bits - 2 * one_layer * 4 < mean_bits(plan) <= bits
    phases = [phase.linear for phase in plan.phases]
    assert [phase.calls for phase in plan.phases] == [*RANGES]
    assert all(rule == phases[0][k] for p in phases for k, rule in p.items()) != per_range


def test_vidit_q_judges_roles_by_their_own_metric() -> None:
    """Self-attention gets 8 bits late, where errors are large; cross-attention early."""
    plan = made("vidit_q")
    first, last = (
        {k.rpartition("blocks.")[2]: r.format for k, r in plan.phases[i].linear.items()}
        for i in (0, -1)
    )
    for block in range(BLOCKS):
        for name, early, late in (("attn1.to_q", first, last), ("attn2.to_q", last, first)):
            if early[f"{block}.{name}"] == "int8_row":
                assert late[f"{block}.{name}"] == "int8_row"
    cross = [Counter(v for k, v in p.items() if "attn2" in k)["int8_row"] for p in (first, last)]
    own = [Counter(v for k, v in p.items() if "attn1" in k)["int8_row"] for p in (first, last)]
    assert cross[0] > cross[1]
    assert own[0] < own[1]


def test_a_budget_is_shared_by_one_metric_and_spent_by_another() -> None:
    units = [
        Unit("a", 4, 8, error=9, own=1),
        Unit("a", 4, 8, error=1, own=9),
        Unit("b", 4, 8, error=5, own=0),
        Unit("b", 4, 8, error=4, own=3),
    ]
    assert raised(units, 16) == set()
    assert raised(units, 20) == {1}  # the error of 0 earns a its budget; 1 is what a asks for
    assert raised(units, 24) == {1, 3}
    assert raised(units, 32) == {0, 1, 3}  # b does not ask for the unit that loses nothing


def test_a_budget_below_four_bits_is_refused() -> None:
    with pytest.raises(PlanError, match=r"the layers take at least 4\.\d\d bits a weight"):
        made("vidit_q", {"mean_bits": 4})


def test_roles_are_those_of_the_attention_that_holds_the_layer() -> None:
    found = layers()
    ground = Ground(profile(), found)
    assert [ground.role(group) for group in found.groups] == [*ROLES.values()] * BLOCKS


def test_lrq_dit_rotates_twice_where_the_input_fluctuates() -> None:
    (phase,) = made("lrq_dit").phases
    found = {int(k.split(".")[1]): r.transform for k, r in phase.linear.items()}
    assert found == {0: "rotate", 1: "rotate", 2: "rotate_twice"}  # J = 0.4, 0.8, 1.2
    assert {(r.format, r.activation) for r in phase.linear.values()} == {("twin_log", "int8_row")}
    (phase,) = made("lrq_dit", {"threshold": 0.0}).phases
    assert {rule.transform for rule in phase.linear.values()} == {"rotate_twice"}


def test_only_what_the_rules_read_is_in_the_side_file() -> None:
    assert {name.split("/")[1] for name in made("lrq_dit").tensors} == {"amax"}
    kept = {name.split("/")[1] for name in made("vq4dit").tensors}
    assert kept == {"codes", "words", "scale", "checksum"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vidit_q", {"rules": ()}, "did not try"),
        (
            "lrq_dit",
            {"groups": tuple(g.model_copy(update={"outliers": {}}) for g in layers().groups)},
            "knows no fluctuation",
        ),
        (
            "vidit_q",
            {
                "groups": tuple(
                    g.model_copy(update={"direction_error": ()}) for g in layers().groups
                )
            },
            "knows no direction_error",
        ),
    ],
)
def test_what_the_profile_lacks(name: str, changes: dict[str, Any], message: str) -> None:
    found = layers(**changes)
    with pytest.raises(PlanError, match=message):
        QuantizationRecipe.load(name).plan(profile(), found, tensors=tensors(layers()))


def test_tensors_that_are_missing_are_named() -> None:
    with pytest.raises(PlanError, match=r"no tensor 'linear/codes/blocks\.0\.attn1\.to_q'"):
        QuantizationRecipe.load("vq4dit").plan(profile(), layers(), tensors={})


@pytest.mark.parametrize("name", NAMES)
def test_other_layers_are_left_alone_and_named(name: str) -> None:
    """One of a width that no format takes, and the last projection."""
    first, *rest, last = layers().groups
    odd = first.model_copy(update={"in_features": 511})
    out = last.model_copy(update={"members": ("proj_out",)})
    found = layers(groups=(odd, *rest, out))
    plan = QuantizationRecipe.load(name).plan(profile(), found, tensors=tensors(found))
    assert len(plan.phases[0].linear) == len(rest)
    (note,) = (a for a in plan.assumptions if a.startswith("left alone"))
    assert note.endswith(": blocks.0.attn1.to_q, proj_out")
