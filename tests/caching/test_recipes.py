from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditopt.caching import RunSignals, Signals, teacache
from ditopt.errors import PlanError
from ditopt.recipes import Recipe, recipe_names

CALLS = 12
NAMES = ("first_block_cache", "magcache", "smoothcache", "taylorseer", "teacache", "uniform")


@pytest.fixture(scope="module")
def signals() -> Signals:
    runs = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.randn(3, 2, 5, 8, generator=generator)
        run = RunSignals()
        for t in torch.linspace(0, 1, CALLS):
            run.add(a + t * b, b + t**2 * c, c + torch.exp(-3 * t) * a)
        runs.append(run)
    return Signals.of_runs(runs)


def test_signals_by_hand() -> None:
    run = RunSignals()
    for value in (1.0, 1.5, 3.0):
        run.add(*(torch.full((1, 2, 4), value * k) for k in (1, 2, 3)))
    found = Signals.of_runs([run, run])
    assert found.modulated == pytest.approx((0.0, 0.5, 1.0))
    assert found.output == pytest.approx((0.0, 0.5, 1.0))
    assert found.magnitudes == pytest.approx((1.0, 1.5, 2.0))
    expected = torch.tensor([[0.0, 0.5, 2.0], [1 / 3, 0.0, 1.0], [2 / 3, 0.5, 0.0]]).double()
    torch.testing.assert_close(found.stack, expected)
    torch.testing.assert_close(found.first_block, expected)


def test_the_polynomial_maps_the_input_s_change_to_the_output_s(signals: Signals) -> None:
    powers = signals.polynomial(4)
    assert len(powers) == 5
    errors = [
        sum(c * x ** (4 - i) for i, c in enumerate(powers)) - y
        for x, y in zip(signals.modulated[1:], signals.output[1:], strict=True)
    ]
    flat = [y - sum(signals.output[1:]) / (CALLS - 1) for y in signals.output[1:]]
    assert sum(e * e for e in errors) < sum(e * e for e in flat)


def test_the_six_recipes_ship_and_cite(signals: Signals) -> None:
    assert recipe_names() == NAMES
    for name in NAMES:
        recipe = Recipe.load(name)
        assert recipe.rule.kind == name
        schedule = recipe.schedule(signals)
        schedule.to_steps()
        assert schedule.full[0] == 0
        assert recipe.paper.arxiv
        assert recipe.paper.where


@pytest.mark.parametrize("name", NAMES)
def test_variants_reach_few_and_all_calls(name: str, signals: Signals) -> None:
    variants = Recipe.load(name).variants(signals)
    counts = {len(schedule.full) for _, schedule in variants}
    assert min(counts) <= CALLS // 3
    assert max(counts) >= CALLS * 3 // 4
    keys = [(schedule.full, tuple(schedule.rows.items())) for _, schedule in variants]
    assert len(set(keys)) == len(keys)


def test_a_variant_is_the_rule_with_its_settings(signals: Signals) -> None:
    for settings, schedule in Recipe.load("teacache").variants(signals):
        polynomial = signals.polynomial(settings["degree"])
        expected = teacache(signals.modulated, settings["threshold"], polynomial=polynomial)
        assert schedule.full == expected.full


GOOD = """\
ditopt_recipe: 1
name: mine
paper: {title: A, arxiv: "2411.19108", where: section 1}
rule: {kind: magcache, threshold: 0.1}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("magcache", "magiccache"), "rule"),
        (GOOD.replace("0.1", "-1"), r"rule\.magcache\.threshold: .*greater than or equal to 0"),
        (GOOD.replace("2411.19108", "no number"), r"paper\.arxiv"),
        (GOOD + "more: 1\n", "more: Extra inputs"),
        (GOOD + "values: {thresold: [0.1]}\n", r"has no setting 'thresold'"),
        (GOOD + "values: {threshold: []}\n", r"values\.threshold"),
        (GOOD + "values: {max_skips: [0]}\n", r"values\.max_skips|max_skips|greater than"),
    ],
)
def test_malformed_recipes_say_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert Recipe.load(path).rule.kind == "magcache"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Recipe.load(path)


def test_an_unknown_name_is_corrected() -> None:
    with pytest.raises(PlanError, match="no recipe 'tea_cache'") as caught:
        Recipe.load("tea_cache")
    assert "teacache" in str(caught.value)
