"""8-bit attention in the search: offered where it was timed, chosen where it is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditopt.errors import ProfileError
from ditopt.plan import Goal, Phase, Plan
from ditopt.profiling import Profile, SeedRecord, load_complete
from ditopt.profiling.arithmetics import ARITHMETICS
from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.search import SearchOptions, plan_from_profile
from ditopt.search.run import predictor_of

from .synthetic import make_profile
from .test_closed_loop import FakeSampler

DENSE_MS = 15.0
ERRORS = (1e-9, 1e-8)
"""Of each head, by arithmetic; the squared norm of a site is its number of heads."""


def with_arithmetic(folder: Path, times: dict[str, float]) -> Profile:
    """`make_profile` with errors of both arithmetics, and times of some."""
    plain = make_profile(folder)
    assert plain.costs is not None
    tables = [c.model_copy(update={"arithmetic_ms": times}) for c in plain.costs.attention]
    costs = plain.costs.model_copy(update={"attention": tuple(tables)})
    profile = plain.model_copy(update={"arithmetics": ARITHMETICS, "costs": costs})
    profile.save(folder)
    for seed in profile.seeds:
        errors = {
            site: torch.tensor(ERRORS, dtype=torch.float64).expand(3, shape.heads, 2).clone()
            for site, shape in profile.shapes.items()
        }
        record = SeedRecord.load(folder, seed, plain)
        record.model_copy(update={"arithmetic_error": errors}).save(folder, seed)
    return profile


def attention(folder: Path) -> Any:
    profile, records = load_complete(folder)
    return predictor_of(folder, profile, records, SearchOptions())[0].attention


@pytest.mark.parametrize(
    ("times", "offered"),
    [
        ({}, []),
        ({"int8_qk": 9.0}, ["int8_qk"]),
        ({"int8_qk": 9.0, "int8_qk_e4m3_pv": 7.0}, ["int8_qk", "int8_qk_e4m3_pv"]),
        ({"int8_qk": DENSE_MS, "int8_qk_e4m3_pv": 7.0}, ["int8_qk_e4m3_pv"]),
    ],
    ids=["no kernel", "one", "both", "not faster"],
)
def test_only_what_is_faster_is_offered(
    tmp_path: Path, times: dict[str, float], offered: list[str]
) -> None:
    with_arithmetic(tmp_path, times)
    for site in attention(tmp_path).sites(0, 3):
        found = {a.name: a for a in site.alternatives if a.name not in ("dense", "drop")}
        assert list(found) == offered
        assert [a.fixed_ms for a in found.values()] == [times[name] for name in offered]
        assert all(a.error.shape == (3, 1) for a in found.values())
        if len(found) == 2:
            one, other = found.values()
            np.testing.assert_allclose(other.error, 10 * one.error)


def test_a_profile_without_them_offers_none(tmp_path: Path) -> None:
    make_profile(tmp_path)
    names = {a.name for site in attention(tmp_path).sites(0, 3) for a in site.alternatives}
    assert names == {"dense", "drop"}


def test_the_search_takes_the_faster_arithmetic(tmp_path: Path) -> None:
    profile = with_arithmetic(tmp_path, {"int8_qk": 1.5, "int8_qk_e4m3_pv": 1.0})
    plan = plan_from_profile(
        tmp_path,
        Goal(min_psnr_db=40.0),
        tmp_path / "plan.yaml",
        verify=FakeSampler(tmp_path),
        options=SearchOptions(techniques=("attention",)),
    )
    assert plan == Plan.load(tmp_path / "plan.yaml")
    first, last = plan.phases
    assert first.arithmetic == {}  # the first calls stay as they are
    assert last.arithmetic == dict.fromkeys(profile.shapes, ArithmeticRule(kind="int8_qk_e4m3_pv"))
    assert last.attention == {}
    assert plan.predicted is not None
    assert plan.predicted.density == 1.0
    calls, start = profile.sampler.calls, last.calls[0]
    saved = (calls - start) * 3 * (DENSE_MS - 1.0)
    assert plan.predicted.seconds == pytest.approx((calls * 75.0 - saved) / 1e3)


def plan_with(profile: Profile, rules: dict[str, ArithmeticRule]) -> Plan:
    calls = profile.sampler.calls
    return Plan(
        model=profile.model,
        sampler=profile.sampler,
        hardware=profile.hardware,
        layout=profile.layout,
        block=profile.block,
        phases=(Phase(calls=(0, 3)), Phase(calls=(3, calls), arithmetic=rules)),
    )


def test_energies_of_plans_are_those_of_the_search(tmp_path: Path) -> None:
    profile = with_arithmetic(tmp_path, {"int8_qk": 1.0})
    made = attention(tmp_path)
    rules = dict.fromkeys(profile.shapes, ArithmeticRule(kind="int8_qk"))
    expected = sum(
        float(a.error.sum())
        for site in made.sites(0, 3)
        for a in site.alternatives
        if a.name == "int8_qk"
    )
    assert made.energy(plan_with(profile, rules), None) == pytest.approx(expected)


def test_what_was_not_measured_is_refused_by_name(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    rules = {next(iter(profile.shapes)): ArithmeticRule(kind="int8_qk")}
    with pytest.raises(ProfileError, match=r"has not measured 'int8_qk' at 'blocks.0.attn1#0'"):
        attention(tmp_path).energy(plan_with(profile, rules), None)
