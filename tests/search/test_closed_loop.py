"""The closed loop on made-up samplers of known quality: goals, audits, honest failures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditopt.errors import GoalUnattainable, PlanError, ProfileError
from ditopt.patterns import HeadPattern
from ditopt.plan import Goal, Plan
from ditopt.profiling import load_complete
from ditopt.search import LoopSpec, Measured, SearchOptions, SearchRecord, plan_from_profile, search
from ditopt.search.calibration import Energies, ErrorModel
from ditopt.search.pareto import pareto_table
from ditopt.search.run import predictor_of, starting_model
from ditopt.search.sensitivity import Technique

from .synthetic import make_profile, save_linears


class FakeSampler:
    """Quality and time by a law that the search does not know: other gains, another exponent."""

    def __init__(
        self,
        folder: Path,
        *,
        attention_db: float = 4.0,
        cache_db: float = 3.0,
        exponent: float = 1.15,
        audit_penalty_db: Sequence[float] = (),
        slowdown: float = 1.0,
    ) -> None:
        profile, records = load_complete(folder)
        self.predictor, _ = predictor_of(folder, profile, records, SearchOptions())
        prior = starting_model(2.0).gains_db
        gains = (prior.attention + attention_db, prior.linears, prior.cache + cache_db)
        self.truth = ErrorModel(2.0, Energies(*gains))
        self.exponent = exponent
        self.penalties = list(audit_penalty_db)
        self.slowdown = slowdown
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, plan: Plan, seeds: Sequence[int]) -> list[Measured]:
        self.calls.append(tuple(seeds))
        penalty = self.penalties.pop(0) if seeds[0] >= 2000 and self.penalties else 0.0
        exact_db = self.truth.psnr_db(self.predictor.energies(plan))
        psnr_db = min(200.0, exact_db * self.exponent - 25 * (self.exponent - 1)) - penalty
        assert plan.predicted is not None
        seconds = plan.predicted.seconds * self.slowdown
        ssim = 1 - 10 ** (-(psnr_db - 15) / 10)
        return [
            Measured(round(psnr_db + 0.1 * (s % 2), 2), seconds, ssim, torch.full((2,), float(s)))
            for s in seeds
        ]


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


@pytest.mark.parametrize(
    ("attention_db", "cache_db", "exponent"),
    [(-5, -10, 0.8), (25, 15, 1.25), (10, -10, 1.25), (25, -10, 1.0), (-5, 15, 1.0)],
)
def test_a_wrong_prediction_is_repaired(
    tmp_path: Path, attention_db: float, cache_db: float, exponent: float
) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(
        tmp_path,
        attention_db=attention_db,
        cache_db=cache_db,
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
    assert audits[:2] == [{2000, 2001, 2002}, {2100, 2101, 2102}]
    assert len(set().union(*audits)) == 3 * len(audits)


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
    sampler = FakeSampler(tmp_path, attention_db=70.0, cache_db=70.0)
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


def test_the_first_calls_stay_dense(tmp_path: Path) -> None:
    make_profile(tmp_path)
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=25.0), verify=FakeSampler(tmp_path))
    assert plan.phases[0].calls[0] == 0
    assert plan.phases[0].attention == {}
    assert plan.cache is not None
    assert plan.cache.full[0] == 0


def test_goals_and_profiles_are_checked(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="at least one of min_psnr_db, min_ssim"):
        search(tmp_path)
    with pytest.raises(ProfileError, match="holds no profile"):
        search(tmp_path, min_psnr_db=30.0)
    make_profile(tmp_path / "full")
    with pytest.raises(ProfileError, match="does not say where its workload is defined"):
        search(tmp_path / "full", min_psnr_db=30.0)


def test_a_spec_bounds_the_sampling(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, attention_db=-5, cache_db=-5, exponent=1.0)
    spec = LoopSpec(tune_seeds=1, audit_seeds=4, max_tunes=1)
    plan_from_profile(
        tmp_path, Goal(min_psnr_db=5.0), verify=sampler, options=SearchOptions(loop=spec)
    )
    assert [len(seeds) for seeds in sampler.calls] == [1, 4]


def test_every_pattern_of_a_plan_is_a_candidate(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=28.0), verify=FakeSampler(tmp_path))
    used: set[HeadPattern] = {p for rule in plan.phases[-1].attention.values() for p in rule}
    assert used <= {option.pattern for option in profile.options}


def test_every_audit_states_mean_worst_and_tenth_percentile(tmp_path: Path) -> None:
    make_profile(tmp_path)
    spec = SearchOptions(loop=LoopSpec(audit_seeds=16))
    plan = plan_from_profile(
        tmp_path, Goal(min_psnr_db=30.0), verify=FakeSampler(tmp_path), options=spec
    )
    audit = plan.verification[-1]
    assert len(audit.psnr_db) == 16
    assert audit.min_psnr_db == min(audit.psnr_db)
    assert audit.min_psnr_db <= audit.p10_psnr_db <= audit.mean_psnr_db
    assert audit.mean_ssim == pytest.approx(1 - 10 ** (-(audit.min_psnr_db - 15) / 10), abs=1e-3)


def test_an_ssim_goal_is_met(tmp_path: Path) -> None:
    make_profile(tmp_path)
    plan = plan_from_profile(tmp_path, Goal(min_ssim=0.97), verify=FakeSampler(tmp_path))
    audit = plan.verification[-1]
    assert audit.mean_ssim is not None
    assert 0.97 <= audit.mean_ssim <= 1 - (1 - 0.97) / 10**0.3  # at most 3 dB too good
    assert plan.predicted is not None
    assert plan.predicted.speedup > 1.2


def test_all_of_several_goals_are_met(tmp_path: Path) -> None:
    make_profile(tmp_path)
    save_linears(tmp_path)
    sampler = FakeSampler(tmp_path)
    dense = sampler.predictor.dense_bytes
    goal = Goal(min_psnr_db=25.0, target_speedup=1.2, max_memory_bytes=dense - 20_000)
    plan = plan_from_profile(tmp_path, goal, verify=sampler)
    audit, predicted = plan.verification[-1], plan.predicted
    assert audit.passed
    assert audit.speedup is not None
    assert predicted is not None
    assert (audit.mean_psnr_db >= 25.0, audit.speedup >= 1.2) == (True, True)
    assert predicted.bytes is not None
    assert predicted.bytes <= dense - 20_000
    assert plan.phases[0].linear == plan.phases[-1].linear != {}
    assert any("release_weights" in line for line in plan.assumptions)


def test_memory_alone_is_met_at_the_best_quality(tmp_path: Path) -> None:
    make_profile(tmp_path)
    save_linears(tmp_path)
    sampler = FakeSampler(tmp_path)
    dense = sampler.predictor.dense_bytes
    plan = plan_from_profile(tmp_path, Goal(max_memory_bytes=dense - 20_000), verify=sampler)
    assert plan.predicted is not None
    assert plan.predicted.bytes is not None
    assert plan.predicted.bytes <= dense - 20_000
    assert plan.cache is None
    assert not plan.phases[-1].attention
    assert 0 < len(plan.phases[-1].linear) < 6
    with pytest.raises(GoalUnattainable, match=r"memory <= 0.*smallest plan is predicted to need"):
        plan_from_profile(tmp_path, Goal(max_memory_bytes=1000), verify=sampler)


def test_a_speed_that_the_quality_forbids_says_what_was_reached(tmp_path: Path) -> None:
    make_profile(tmp_path)
    goal = Goal(min_psnr_db=30.0, target_speedup=9.0)
    with pytest.raises(GoalUnattainable, match=r"fastest plan of that quality gave .* dB at"):
        plan_from_profile(tmp_path, goal, verify=FakeSampler(tmp_path))


@pytest.mark.parametrize("technique", ["attention", "cache", "linears"])
def test_techniques_can_be_left_out(tmp_path: Path, technique: Technique) -> None:
    make_profile(tmp_path)
    save_linears(tmp_path)
    plan = plan_from_profile(
        tmp_path,
        Goal(min_psnr_db=25.0),
        verify=FakeSampler(tmp_path, attention_db=0.0),
        options=SearchOptions(techniques=(technique,)),
    )
    last = plan.phases[-1]
    assert (plan.cache is not None) == (technique == "cache")
    assert bool(last.attention) == (technique == "attention")
    assert bool(last.linear) == (technique == "linears")


def test_too_good_an_audit_leads_to_a_faster_plan(tmp_path: Path) -> None:
    """Fresh seeds are 4 dB better than tune seeds, so what just passed on these is too careful."""
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, audit_penalty_db=[-4.0, -4.0, -4.0])
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), verify=sampler)
    audits = [v for v in plan.verification if v.purpose == "audit"]
    assert len(audits) == 2
    assert audits[0].mean_psnr_db > 33.0
    assert 30.0 <= audits[1].mean_psnr_db <= 32.0
    assert [v.adopted for v in audits] == [False, True]


def test_an_overshoot_is_kept_only_where_the_next_cheaper_plan_fails(tmp_path: Path) -> None:
    """Only schedules may be chosen, and each one less full call costs several dB."""
    make_profile(tmp_path, roughness=0.0)
    only = SearchOptions(techniques=("cache",))
    for goal_db in (31.0, 36.0):
        sampler = FakeSampler(tmp_path, exponent=1.0)
        plan = plan_from_profile(tmp_path, Goal(min_psnr_db=goal_db), verify=sampler, options=only)
        audit = next(v for v in plan.verification if v.purpose == "audit" and v.adopted)
        assert audit.mean_psnr_db >= goal_db
        assert audit.mean_psnr_db > goal_db + 1.5
        record = SearchRecord.load(tmp_path)
        assert record is not None
        adopted = next(trial for trial in record.trials if trial.adopted)
        failed = [t for t, v in zip(record.trials, plan.verification, strict=True) if not v.passed]
        assert [trial.full_calls for trial in failed] == [adopted.full_calls - 1]


def test_what_was_searched_is_recorded(tmp_path: Path) -> None:
    make_profile(tmp_path)
    out = tmp_path / "plan.yaml"
    plan = plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), out, verify=FakeSampler(tmp_path))
    record = SearchRecord.load(tmp_path)
    assert record is not None
    assert record.goal == "PSNR >= 30 dB"
    assert record.plan_sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [t.purpose for t in record.trials] == [v.purpose for v in plan.verification]
    assert [t.adopted for t in record.trials] == [v.adopted for v in plan.verification]
    quality = [p.predicted_psnr_db for p in record.frontier]
    speed = [p.predicted_speedup for p in record.frontier]
    assert quality == sorted(quality, reverse=True)
    assert speed == sorted(speed)
    assert len(record.frontier) > 3
    found = load_file(tmp_path / "optimized_2000.safetensors")["result"]
    assert found.tolist() == [2000.0, 2000.0]
    shown = pareto_table(record)
    assert shown.row_count == len(record.frontier) + len(record.trials)


def test_a_failed_search_leaves_its_record(tmp_path: Path) -> None:
    make_profile(tmp_path)
    sampler = FakeSampler(tmp_path, attention_db=70.0, cache_db=70.0)
    with pytest.raises(GoalUnattainable):
        plan_from_profile(tmp_path, Goal(min_psnr_db=60.0), verify=sampler)
    record = SearchRecord.load(tmp_path)
    assert record is not None
    assert record.plan_sha256 is None
    assert record.trials


def test_damaged_records_are_named(tmp_path: Path) -> None:
    assert SearchRecord.load(tmp_path) is None
    (tmp_path / "search.json").write_text('{"goal": 3}')
    with pytest.raises(ProfileError, match=r"search.json: goal"):
        SearchRecord.load(tmp_path)


def test_linear_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    make_profile(tmp_path)
    save_linears(tmp_path)
    path = tmp_path / "linears.json"
    path.write_text(path.read_text().replace("b" * 64, "c" * 64))
    with pytest.raises(ProfileError, match=r"linears.json is of another model"):
        plan_from_profile(tmp_path, Goal(min_psnr_db=30.0), verify=lambda plan, seeds: [])


def test_half_a_profile_is_refused(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    profile.model_copy(update={"finished": (0,), "costs": None}).save(tmp_path)
    with pytest.raises(ProfileError, match="half written: 1 of 2 seeds"):
        search(tmp_path, min_psnr_db=30.0)
    profile.save(tmp_path)
    (tmp_path / "seed_1.safetensors").unlink()
    with pytest.raises(ProfileError, match=r"seed_1.safetensors is missing or damaged"):
        search(tmp_path, min_psnr_db=30.0)
