"""Attention recipes: each is the plan that its paper's rule gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ditopt.errors import PlanError, ProfileError
from ditopt.layout import TokenLayout
from ditopt.patterns import (
    Circle,
    Dense,
    ExactTopK,
    FrameTile,
    HeadPattern,
    MultiDiagonal,
    Skip,
    Stripe,
    TwoMasks,
    Window,
    density,
)
from ditopt.plan import Block, Hardware, ModelRecord, Plan, Sampler, SiteRecord
from ditopt.plan.schema import MeanRemainder
from ditopt.profiling.schema import AttentionOption, Profile, SeedRecord, SiteShape
from ditopt.recipes import AttentionRecipe, attention_recipe_names, plan_of_recipe
from ditopt.recipes.__main__ import page
from ditopt.token_order import Morton, Tile

ROOT = Path(__file__).parents[2]
HEADS, CALLS, OBSERVED = 3, 20, (0, 10, 19)
GRID = TokenLayout(6, 8, 16)
SITES = tuple(f"blocks.{k}.attn#0" for k in range(4))
PATTERNS: tuple[HeadPattern, ...] = (
    Dense(),
    Window(frames=3, rows=8, cols=16),
    Window(frames=1, rows=8, cols=16),
    MultiDiagonal(period="frame", width=0),
    Stripe(unit="frame", every=6, reach=1),
    FrameTile(references=1),
    FrameTile(references=3),
    Skip(),
)
NAMES = (
    "adaspa",
    "clear",
    "draft_attention",
    "efficient_vdit",
    "pooled_top_k",
    "sol_attention",
    "sparse_vdit",
    "sparse_videogen",
    "svg2",
    "uniform_window",
)


def profile(layout: TokenLayout | None = GRID, **changes: Any) -> Profile:
    tokens = layout.total if layout is not None else 768
    shape = SiteShape(batch=1, heads=HEADS, tokens=tokens, head_dim=16, dtype="float32")
    values: dict[str, Any] = {
        "model": ModelRecord(
            architecture="a" * 64,
            weights="b" * 64,
            name="Model",
            sites=tuple(
                SiteRecord(id=site, kind="self", heads=HEADS, head_dim=16) for site in SITES
            ),
        ),
        "sampler": Sampler(calls=CALLS),
        "hardware": Hardware(device="cpu", name="a CPU", torch="2.13.0", threads=2),
        "layout": layout,
        "block": Block(q=64, k=64),
        "options": tuple(
            AttentionOption(pattern=pattern) for pattern in (PATTERNS if layout else PATTERNS[:1])
        ),
        "shapes": dict.fromkeys(SITES, shape),
        "observed_calls": OBSERVED,
        "data_range": 2.0,
        "seeds": (0,),
        "finished": (0,),
    }
    return Profile(**{**values, **changes})


def records(made: Profile, errors: dict[str, Any] | None = None) -> list[SeedRecord]:
    """Errors in proportion to what is left out unless `errors` changes them; norms of 100."""
    shape = (len(made.observed_calls), HEADS, len(made.options))
    kept = torch.tensor(made.kept(made.shapes[SITES[0]]), dtype=torch.float64)
    usual = torch.where(kept == 0, 100.0, 3 * (1 - kept))
    squared = {site: usual.expand(shape).clone() for site in SITES}
    for site, change in (errors or {}).items():
        change(squared[site])
    return [
        SeedRecord(
            squared_error=squared,
            squared_norm={site: torch.full(shape[:2], 100.0).double() for site in SITES},
            gram=torch.eye(CALLS).double(),
            hidden_energy=torch.ones(CALLS).double(),
            step_energy=torch.ones(CALLS).double(),
        )
    ]


def made(name: str, setting: dict[str, Any] | None = None, **errors: Any) -> Plan:
    given = profile()
    return AttentionRecipe.load(name).plan(given, records(given, errors), setting)


def test_the_recipes_ship_and_cite() -> None:
    assert attention_recipe_names() == NAMES
    for name in NAMES:
        recipe = AttentionRecipe.load(name)
        assert recipe.differs
        assert recipe.paper.where


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_gives_a_plan_that_survives_a_round_trip(name: str) -> None:
    given, recipe = profile(), AttentionRecipe.load(name)
    rows = records(given)
    plans = [recipe.plan(given, rows, setting) for setting in recipe.settings()]
    for plan in plans:
        assert plan.cache is None
        assert Plan.from_text(plan.to_text()) == plan
    assert len(set(plans)) > 1
    assert recipe.name in recipe.plan(given, rows).assumptions[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_is_dense(name: str) -> None:
    recipe = AttentionRecipe.load(name)
    plan = made(name)
    first, last = (
        math.ceil(share * CALLS)
        for share in (recipe.rule.dense_calls, recipe.rule.last_dense_calls)
    )
    for phase in plan.phases:
        warm = phase.calls[1] <= first or phase.calls[0] >= CALLS - last
        assert warm == (not phase.attention and not phase.selectors)


def test_one_window_for_all_heads() -> None:
    plan = made("uniform_window")
    window = Window(frames=4, rows=4, cols=8)
    assert plan.phases[-1].attention == dict.fromkeys(SITES, (window,) * HEADS)
    assert (plan.order, plan.block) == (Tile(frames=4, rows=4, cols=4), Block(q=64, k=64))


def test_sparse_vdit_takes_the_least_error_plus_density() -> None:
    given = profile()
    kept = given.kept(given.shapes[SITES[0]])

    def set_errors(errors: Any) -> None:
        errors[:, 0] = 100.0  # nothing but dense will do
        errors[:, 0, 0] = 0.0
        errors[:, 1] = 30.0
        errors[:, 1, 3] = 1.0  # the multi-diagonal
        errors[0, 2] = 30.0
        errors[0, 2, 4] = 0.0  # the stripe at the first call
        errors[1:, 2, 7] = 0.0  # skipping later

    plan = made("sparse_vdit", {"threshold": 0.45}, **{SITES[0]: set_errors})
    losses = [0.01 + 0.5 * kept[3], 0.5 * kept[4], 0.0]
    assert max(losses) <= 0.45
    chosen = [(phase.calls, phase.attention.get(SITES[0])) for phase in plan.phases]
    assert [calls for calls, _ in chosen] == [(0, 6), (6, 15), (15, 20)]
    assert chosen[0][1] == (Dense(), PATTERNS[3], PATTERNS[4])
    assert chosen[1][1] == chosen[2][1] == (Dense(), PATTERNS[3], Skip())


def test_sparse_vdit_is_dense_where_nothing_is_good_enough() -> None:
    def all_bad(errors: Any) -> None:
        errors[..., 1:] = 200.0

    plan = made("sparse_vdit", **dict.fromkeys(SITES, all_bad))
    assert not any(phase.attention for phase in plan.phases)


def test_frame_tiles_follow_a_budget_by_layer() -> None:
    def good(errors: Any) -> None:
        errors[..., 5] = 0.5  # 0.07 relative
        errors[..., 6] = 0.1

    def fair(errors: Any) -> None:
        errors[..., 5] = 10.0  # 0.32
        errors[..., 6] = 2.0  # 0.14

    def bad(errors: Any) -> None:
        errors[..., 1:] = 50.0

    plan = made("efficient_vdit", **dict(zip(SITES, (good, fair, bad, bad), strict=True)))
    (phase,) = plan.phases
    assert phase.attention == {
        SITES[0]: (FrameTile(references=1),) * HEADS,
        SITES[1]: (FrameTile(references=3),) * HEADS,
    }


def test_stripes_of_whole_frames_are_frame_tiles() -> None:
    stripe = Stripe(unit="frame", every=3)
    given = profile(options=tuple(AttentionOption(pattern=p) for p in (Dense(), stripe)))
    (phase,) = AttentionRecipe.load("efficient_vdit").plan(given, records(given)).phases
    assert phase.attention == dict.fromkeys(SITES, (stripe,) * HEADS)


def test_frame_tiles_must_have_been_measured() -> None:
    given = profile(options=tuple(AttentionOption(pattern=p) for p in PATTERNS[:5]))
    with pytest.raises(PlanError, match="the profile measured no frame tiles"):
        AttentionRecipe.load("efficient_vdit").plan(given, records(given))


def test_the_band_of_sparse_videogen_has_the_density_that_was_asked_for() -> None:
    plan = made("sparse_videogen")
    assert [phase.calls for phase in plan.phases] == [(0, 2), (2, 20)]
    selectors = plan.phases[1].selectors
    assert list(selectors) == list(SITES[1:])  # one of four layers is the first 3 %
    selector = selectors[SITES[1]]
    assert isinstance(selector, TwoMasks)
    kept = density(selector.pattern, GRID, GRID.total, GRID.total, 1, 1)
    assert kept == pytest.approx(0.25, abs=0.01)


def test_text_takes_its_part_of_the_density() -> None:
    given = profile(TokenLayout(6, 8, 16, text_after=32))
    recipe = AttentionRecipe.load("sparse_videogen")
    selector = recipe.plan(given, records(given)).phases[1].selectors[SITES[1]]
    assert isinstance(selector, TwoMasks)
    kept = density(selector.pattern, given.layout, 800, 800, 1, 1)
    assert kept == pytest.approx(0.25, abs=0.01)


def test_adaspa_searches_at_two_calls() -> None:
    plan = made("adaspa")
    assert [phase.calls for phase in plan.phases] == [(0, 4), (4, 12), (12, 20)]
    selector = plan.phases[1].selectors[SITES[0]]
    assert selector == ExactTopK(density=0.2, adaptive=True, refresh=10_000)
    assert plan.block == Block(q=64, k=64)


def test_draft_attention_has_patches_as_blocks() -> None:
    plan = made("draft_attention")
    assert (plan.order, plan.block) == (Tile(rows=8, cols=16), Block(q=128, k=128))


def test_sol_attention_substitutes_means() -> None:
    plan = made("sol_attention")
    assert [phase.calls for phase in plan.phases] == [(0, 4), (4, 18), (18, 20)]
    assert plan.phases[1].remainders == dict.fromkeys(SITES[1:], MeanRemainder())
    assert plan.order == Morton()


def test_clear_is_a_disk_through_all_frames() -> None:
    disk = Circle(radius=16, frames=6)
    assert made("clear").phases[0].attention[SITES[0]] == (disk,) * HEADS


@pytest.mark.parametrize(("name", "paper"), [("sparse_videogen", "Sparse VideoGen"),
                                             ("efficient_vdit", "Efficient-vDiT")])  # fmt: skip
def test_video_methods_refuse_pictures(name: str, paper: str) -> None:
    given = profile(TokenLayout(1, 24, 32))
    with pytest.raises(PlanError, match=f"{paper} is about videos"):
        AttentionRecipe.load(name).plan(given, records(given))


def test_without_a_grid_there_is_no_recipe() -> None:
    given = profile(None)
    with pytest.raises(PlanError, match="the profile knows no token grid"):
        AttentionRecipe.load("clear").plan(given, records(given))


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"density": 0.0}, "density: .*greater than 0"), ({"densty": 0.1}, "densty: Extra inputs")],
)
def test_bad_settings_say_which(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        made("adaspa", setting)


def test_the_pages_of_recipes_are_up_to_date() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert text == page(), "run: make docs"


def test_a_plan_from_a_folder_needs_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="holds no profile"):
        plan_of_recipe(tmp_path, "clear")
