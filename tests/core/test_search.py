"""The search against brute force, planted structure, and made-up samplers of known quality."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditopt.caching import CacheSchedule, schedule_error
from ditopt.errors import GoalUnattainable, PlanError, ProfileError
from ditopt.layout import TokenLayout
from ditopt.patterns import HeadPattern, block_mask, candidates
from ditopt.plan import Block, Goal, Hardware, ModelRecord, Plan, Sampler, SiteRecord
from ditopt.profiling import load_complete
from ditopt.profiling.candidates import candidate_errors
from ditopt.profiling.schema import (
    AttentionCost,
    AttentionOption,
    Costs,
    Profile,
    SeedRecord,
    SiteShape,
)
from ditopt.search import LoopSpec, Measured, plan_from_profile, search
from ditopt.search.assignment import evaluate, frontier, solve
from ditopt.search.calibration import ErrorModel, Observation
from ditopt.search.prediction import Predictor
from ditopt.search.problem import SiteOptions, sparse_cost

CALLS, HEADS, LAYERS = 12, 3, 4
LAYOUT = TokenLayout(4, 8, 8)
SIZES = (LAYOUT.tokens, LAYOUT.tokens, 16, 16)


def brute_force(sites: Sequence[SiteOptions], minimize: str, budget: float) -> float:
    bounded = "error" if minimize == "ms" else "ms"
    best = math.inf
    per_site = [
        [None, *itertools.product(range(len(s.option_ms)), repeat=len(s.error))] for s in sites
    ]
    for choice in itertools.product(*per_site):
        options = {s.id: c for s, c in zip(sites, choice, strict=True) if c is not None}
        point = evaluate(sites, options)
        if getattr(point, bounded) <= budget:
            best = min(best, getattr(point, minimize))
    return best


@st.composite
def problems(draw: st.DrawFn) -> list[SiteOptions]:
    amount = st.floats(0, 10).map(lambda x: round(x, 3))
    sites = []
    for number in range(draw(st.integers(1, 2))):
        heads, options = draw(st.integers(1, 2)), draw(st.integers(2, 4))
        error = np.array([[0.0, *(draw(amount) for _ in range(options - 1))] for _ in range(heads)])
        option_ms = np.array([draw(amount) for _ in range(options)])
        sites.append(SiteOptions(f"s{number}", draw(amount) + 0.1, draw(amount), option_ms, error))
    return sites


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0, 20), st.sampled_from(["ms", "error"]))
def test_assignment_equals_brute_force(
    sites: list[SiteOptions], budget: float, minimize: Any
) -> None:
    expected = brute_force(sites, minimize, budget)
    found = solve(sites, minimize, budget)
    if math.isinf(expected):
        assert found is None
        return
    assert found is not None
    assert getattr(found, minimize) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert getattr(found, "error" if minimize == "ms" else "ms") <= budget


def test_the_frontier_falls_from_exact_to_fast() -> None:
    rng = np.random.default_rng(0)
    kept = np.linspace(1, 0, 8)
    sites = [
        SiteOptions(f"s{s}", 20.0, 1.0, kept * 5, (1 - kept) ** 2 * rng.uniform(0.1, 9, (4, 1)))
        for s in range(6)
    ]
    points = frontier(sites)
    assert points[0].error == 0
    assert [p.ms for p in points] == sorted((p.ms for p in points), reverse=True)
    assert [p.error for p in points] == sorted(p.error for p in points)
    assert len(points) > 20


def test_many_sites_use_the_frontier_and_stay_fast() -> None:
    """60 layers of 40 heads with 30 options."""
    rng = np.random.default_rng(0)
    kept = np.linspace(1, 0, 30)
    error = (1 - kept) ** 2 * rng.uniform(0.1, 9, (40, 1))
    sites = [SiteOptions(f"s{s}", 20.0, 1.0, kept, error) for s in range(60)]
    found = solve(sites, "ms", 2000.0)
    assert found is not None
    assert 1900.0 < found.error <= 2000.0
    assert found.ms < 60 * 20


def test_the_cost_line_never_goes_below_zero() -> None:
    shape = SiteShape(batch=1, heads=1, tokens=8, head_dim=8, dtype="float32")
    line = AttentionCost(shape=shape, dense_ms=1, sparse_ms=((1.0, 12.0), (0.5, 7.0), (0.1, 3.0)))
    assert sparse_cost(line) == pytest.approx((2.0, 10.0))
    falling = AttentionCost(shape=shape, dense_ms=1, sparse_ms=((1.0, 1.0), (0.1, 2.0)))
    assert min(sparse_cost(falling)) >= 0


def planted_heads() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Heads that attend to their frame, their place in other frames, the first frame, to all."""
    n = LAYOUT.tokens
    position = torch.arange(n)
    frame, place = position // 64, position % 64
    codes = {
        "frame": torch.nn.functional.one_hot(frame).float(),
        "place": torch.nn.functional.one_hot(place).float(),
        "sink": torch.ones(n, 1),
        "diffuse": torch.zeros(n, 1),
    }
    heads = {}
    generator = torch.Generator().manual_seed(0)
    for name, code in codes.items():
        q = k = code * 5.0
        if name == "sink":
            k = (frame == 0).float()[:, None] * 12.0
            q = torch.ones(n, 1)
        v = torch.randn(n, 16, generator=generator)
        heads[name] = (q, k, v)
    return heads


@pytest.mark.parametrize(
    ("head", "kinds", "most"),
    [
        ("frame", {"window", "band", "stripe"}, 0.30),
        ("place", {"multi_diagonal", "window"}, 0.30),
        ("sink", {"stripe"}, 0.50),
        ("diffuse", {"dense"}, 1.0),
    ],
)
def test_planted_structure_is_recovered(head: str, kinds: set[str], most: float) -> None:
    q, k, v = (x[None, None] for x in planted_heads()[head])
    patterns = candidates(LAYOUT, LAYOUT.tokens, 16, 16)
    keep = torch.stack([block_mask(p, LAYOUT, *SIZES) for p in patterns])
    found = candidate_errors(q, k, v, keep, block_q=16, block_k=16, scale=1.0)
    kept = keep.double().mean((1, 2)).numpy()
    error = (found.squared_error / found.squared_norm[:, None]).numpy()
    site = SiteOptions("s", 100.0, 0.0, kept, error)
    chosen = solve([site], "ms", 0.02)
    assert chosen is not None
    pattern = patterns[chosen.options["s"][0]]
    assert pattern.kind in kinds
    assert kept[chosen.options["s"][0]] <= most


def make_profile(folder: Path, *, roughness: float = 0.02, seeds: int = 2) -> Profile:
    """Made-up heads, some local, some diffuse; residuals drift along a smooth curve."""
    patterns = candidates(LAYOUT, LAYOUT.tokens, 16, 16)
    kept = torch.stack([block_mask(p, LAYOUT, *SIZES) for p in patterns]).double().mean((1, 2))
    shape = SiteShape(batch=2, heads=HEADS, tokens=LAYOUT.tokens, head_dim=16, dtype="float32")
    ids = [f"blocks.{layer}.attn1#0" for layer in range(LAYERS)]
    table = tuple((density, 2.0 + 18.0 * density) for density in (1.0, 0.5, 0.25))
    profile = Profile(
        model=ModelRecord(
            architecture="a" * 64,
            weights="b" * 64,
            name="Toy",
            sites=tuple(SiteRecord(id=i, kind="self", heads=HEADS, head_dim=16) for i in ids),
        ),
        sampler=Sampler(calls=CALLS),
        hardware=Hardware(device="cpu", name="a CPU", torch="2.13.0", threads=2),
        layout=LAYOUT,
        block=Block(q=16, k=16),
        options=tuple(AttentionOption(pattern=p) for p in patterns),
        shapes=dict.fromkeys(ids, shape),
        observed_calls=(0, 6, 11),
        data_range=2.0,
        seeds=tuple(range(seeds)),
        finished=tuple(range(seeds)),
        costs=Costs(
            dense_call_ms=100.0,
            skip_call_ms=10.0,
            attention=(AttentionCost(shape=shape, dense_ms=15.0, sparse_ms=table),),
        ),
    )
    folder.mkdir(exist_ok=True)
    profile.save(folder)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        errors, norms = {}, {}
        for layer, site in enumerate(ids):
            difficulty = torch.tensor([0.001, 0.02, 0.3]) * (1 + layer)
            errors[site] = (difficulty[:, None] * (1 - kept) ** 2).repeat(3, 1, 1).double()
            norms[site] = torch.ones(3, HEADS, dtype=torch.float64)
        time = torch.linspace(0, 1, CALLS, dtype=torch.float64)[:, None]
        basis = torch.randn(3, 64, generator=generator, dtype=torch.float64)
        noise = torch.randn(CALLS, 64, generator=generator, dtype=torch.float64)
        residuals = basis[0] + time * basis[1] + time**2 * basis[2] + roughness * noise
        SeedRecord(
            squared_error=errors,
            squared_norm=norms,
            gram=residuals @ residuals.T,
            hidden_energy=2 * residuals.square().sum(1),
            step_energy=torch.full((CALLS,), 0.01, dtype=torch.float64),
        ).save(folder, seed)
    return profile


class FakeSampler:
    """Quality and time by a law that the search does not know: other gains, another exponent."""

    def __init__(
        self,
        folder: Path,
        *,
        attention_gain_db: float = 14.0,
        cache_gain_db: float = 3.0,
        exponent: float = 1.15,
        audit_penalty_db: Sequence[float] = (),
        slowdown: float = 1.0,
    ) -> None:
        self.profile, self.records = load_complete(folder)
        self.attention_gain = 10 ** (attention_gain_db / 10)
        self.cache_gain = 10 ** (cache_gain_db / 10)
        self.exponent = exponent
        self.penalties = list(audit_penalty_db)
        self.slowdown = slowdown
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, plan: Plan, seeds: Sequence[int]) -> list[Measured]:
        self.calls.append(tuple(seeds))
        penalty = self.penalties.pop(0) if seeds[0] >= 2000 and self.penalties else 0.0
        energy = self.attention_gain * self.attention(plan) + self.cache_gain * self.cache(plan)
        psnr_db = -10 * self.exponent * math.log10(energy / 4 + 1e-20) - penalty
        psnr_db = min(200.0, psnr_db)
        seconds = plan.predicted.seconds * self.slowdown if plan.predicted else 1.0
        return [Measured(round(psnr_db + 0.1 * (s % 2), 2), seconds) for s in seeds]

    def attention(self, plan: Plan) -> float:
        number = {option.pattern: i for i, option in enumerate(self.profile.options)}
        error = self.records[0].squared_error
        return 0.01 * sum(
            float(error[site][0, head, number[pattern]])
            for phase in plan.phases
            for site, patterns in phase.attention.items()
            for head, pattern in enumerate(patterns)
        )

    def cache(self, plan: Plan) -> float:
        if plan.cache is None:
            return 0.0
        schedule = CacheSchedule(CALLS, plan.cache.full, plan.cache.coefficients)
        return 0.05 * schedule_error(self.records[0].gram, schedule)


def test_a_quality_goal_is_met_and_recorded(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path)
    plan = plan_from_profile(
        tmp_path, Goal(min_psnr_db=30.0), tmp_path / "plan.yaml", verify=sampler
    )
    assert plan == Plan.load(tmp_path / "plan.yaml")
    audit = plan.verification[-1]
    assert (audit.purpose, audit.passed, audit.adopted) == ("audit", True, True)
    assert 30.0 <= audit.mean_psnr_db <= 32.5
    assert plan.predicted is not None
    assert plan.predicted.speedup > 1.3
    assert sum(len(seeds) for seeds in sampler.calls) <= 12
    assert len(plan.verification) == len(sampler.calls)
    assert any(v.purpose == "tune" and v.adopted for v in plan.verification)


@pytest.mark.parametrize("attention_gain_db", [5.0, 20.0, 35.0])
@pytest.mark.parametrize("cache_gain_db", [-10.0, 5.0, 15.0])
@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.25])
def test_a_wrong_prediction_is_repaired(
    tmp_path: Path, attention_gain_db: float, cache_gain_db: float, exponent: float
) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(
        tmp_path,
        attention_gain_db=attention_gain_db,
        cache_gain_db=cache_gain_db,
        exponent=exponent,
    )
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), verify=sampler)
    assert plan.verification[-1].mean_psnr_db >= 30.0


def test_seeds_of_profile_tune_and_audit_are_disjoint(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, audit_penalty_db=[3.0])
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), verify=sampler)
    tune = {s for v in plan.verification if v.purpose == "tune" for s in v.seeds}
    audits = [set(v.seeds) for v in plan.verification if v.purpose == "audit"]
    assert tune == {1000, 1001}
    assert audits == [{2000, 2001, 2002}, {2100, 2101, 2102}]


def test_a_failed_audit_widens_the_margin(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, audit_penalty_db=[3.0, 3.0])
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), verify=sampler)
    audits = [v for v in plan.verification if v.purpose == "audit"]
    assert [v.passed for v in audits] == [False, True]
    assert audits[1].margin_db > audits[0].margin_db + 1.5
    assert plan.verification[-1].adopted


def test_audits_that_keep_failing_are_an_honest_failure(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, audit_penalty_db=[3.0, 9.0, 20.0])
    with pytest.raises(GoalUnattainable, match=r"PSNR >= 30 dB.*dB at \d\.\d+x"):
        plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), tmp_path / "p.yaml", verify=sampler)
    assert not (tmp_path / "p.yaml").exists()


def test_a_speed_goal_is_met(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, slowdown=1.25)
    plan = plan_from_profile(tmp_path, Goal(target_speedup=1.8), verify=sampler)
    audit = plan.verification[-1]
    assert audit.speedup is not None
    assert 1.8 <= audit.speedup <= 2.1


def test_an_unattainable_speed_says_the_best(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path)
    with pytest.raises(GoalUnattainable, match=r"speedup >= 50x.*predicted to give \d\.\d+x"):
        plan_from_profile(tmp_path, Goal(target_speedup=50.0), verify=sampler)


def test_an_unattainable_quality_says_the_best(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, attention_gain_db=70.0, cache_gain_db=70.0)
    with pytest.raises(GoalUnattainable, match=r"the best plan faster than dense gave"):
        plan_from_profile(tmp_path, Goal(min_psnr_db=60.0), verify=sampler)


def test_planning_twice_gives_the_same_file(tmp_path: Path) -> None:
    make_profile(tmp_path)
    texts = [
        plan_from_profile(
            tmp_path, Goal(min_psnr_db=30.0), verify=FakeSampler(tmp_path, slowdown=slowdown)
        ).to_text()
        for slowdown in (1.0, 1.1)
    ]
    assert texts[0] == texts[1]


def test_higher_quality_costs_time(tmp_path: Path) -> None:
    make_profile(tmp_path)
    predictor = Predictor(*load_complete(tmp_path))
    model = ErrorModel(data_range=2.0)
    found = [predictor.fastest(model, psnr_db) for psnr_db in (20.0, 30.0, 40.0, 50.0)]
    seconds = [candidate.seconds for candidate in found if candidate is not None]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4
    for psnr_db, candidate in zip((20.0, 30.0, 40.0, 50.0), found, strict=True):
        assert candidate is not None
        assert model.psnr_db(candidate.attention_error, candidate.cache_error) >= psnr_db - 1e-6


def test_the_first_calls_stay_dense(tmp_path: Path) -> None:
    make_profile(tmp_path)
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=25.0), verify=FakeSampler(tmp_path))
    assert plan.phases[0].calls[0] == 0
    assert plan.phases[0].attention == {}
    assert plan.cache is not None
    assert plan.cache.full[0] == 0


def test_calibration_learns_both_gains() -> None:
    truth = ErrorModel(2.0, attention_gain_db=7.0, cache_gain_db=-4.0)
    seen = [
        Observation(a, c, truth.psnr_db(a, c))
        for a, c in ((1e-3, 1e-5), (1e-5, 1e-3), (3e-4, 3e-4))
    ]
    fitted = ErrorModel(2.0).fit(seen)
    assert fitted.attention_gain_db == pytest.approx(7.0, abs=0.3)
    assert fitted.cache_gain_db == pytest.approx(-4.0, abs=0.3)


def test_goals_and_profiles_are_checked(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="exactly one of min_psnr_db and target_speedup"):
        search(tmp_path)
    with pytest.raises(ProfileError, match="holds no profile"):
        search(tmp_path, min_psnr_db=30.0)
    make_profile(tmp_path / "full")
    with pytest.raises(ProfileError, match="does not say where its workload is defined"):
        search(tmp_path / "full", min_psnr_db=30.0)


def test_a_spec_bounds_the_sampling(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path)
    spec = LoopSpec(tune_seeds=1, audit_seeds=4, max_tunes=1)
    plan_from_profile(tmp_path, Goal(min_psnr_db=5.0), verify=sampler, spec=spec)
    assert [len(seeds) for seeds in sampler.calls] == [1, 4]


def test_every_pattern_of_a_plan_is_a_candidate(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=28.0), verify=FakeSampler(tmp_path))
    used: set[HeadPattern] = {p for rule in plan.phases[-1].attention.values() for p in rule}
    assert used <= {option.pattern for option in profile.options}
