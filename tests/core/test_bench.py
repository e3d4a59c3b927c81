import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ditopt.bench import DEFAULT_SEEDS, bench, default_variants
from ditopt.bench_gate import ROUNDING_8_BIT_DB
from ditopt.errors import DitoptError, VerificationError, WorkloadError
from ditopt.workload import Workload


def sample(model, seed):
    x = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(seed))
    for _ in range(3):
        x = model(x)
    return x


WORKLOAD = Workload(nn.Identity().eval(), sample, data_range=1.0, name="toy")


def off_by(error):
    """A variant whose every call adds `error`; three calls make a loop."""
    return lambda module: lambda x: module(x) + error / 3


def variants(inductor=1e-4, ditopt=1e-4, planned=1e-2):
    return {
        "eager": lambda module: module,
        "inductor": off_by(inductor),
        "ditopt": off_by(ditopt),
        "ditopt+plan": off_by(planned),
    }


def plan(goal, audit=(7, 8), adopted=True):
    return SimpleNamespace(
        goal=SimpleNamespace(min_psnr_db=goal),
        verification=(
            SimpleNamespace(purpose="tune", adopted=True, seeds=(1,)),
            SimpleNamespace(purpose="audit", adopted=adopted, seeds=audit),
        ),
    )


def test_rows_hold_what_the_contract_names():
    result = bench(WORKLOAD, plan(goal=39.0), variants=variants())
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [row["variant"] for row in written["rows"]] == [
        *("eager", "inductor", "ditopt", "ditopt+plan")
    ]
    names = {"variant", "ms", "ms_iqr", "psnr_db", "ssim", "max_error", "compile_s", "peak_bytes"}
    for row in written["rows"]:
        assert names | {"seeds"} <= row.keys()
        assert row["ms"] > 0
        assert row["compile_s"] >= 0
        assert row["seeds"] == [7, 8]
    assert {"device", "name", "torch", "threads", "date", "workload"} <= written[
        "environment"
    ].keys()
    assert written["failures"] == []


def test_quality_is_against_eager():
    result = bench(WORKLOAD, variants=variants(planned=0.01))
    assert result.row("eager").psnr_db is None  # equal bit for bit
    assert result.row("eager").max_error == 0
    assert result.row("inductor").psnr_db == pytest.approx(80.0, abs=0.1)
    assert result.row("ditopt+plan").psnr_db == pytest.approx(40.0, abs=0.01)
    assert result.row("ditopt+plan").max_error == pytest.approx(0.01, rel=1e-3)


def test_seeds_are_the_audit_s_of_the_adopted_plan():
    assert bench(WORKLOAD, plan(30.0), variants=variants()).rows[0].seeds == (7, 8)
    assert bench(WORKLOAD, variants=variants()).rows[0].seeds == DEFAULT_SEEDS
    unverified = plan(30.0, adopted=False)
    assert bench(WORKLOAD, unverified, variants=variants()).rows[0].seeds == DEFAULT_SEEDS
    with pytest.raises(WorkloadError, match="at least one seed"):
        bench(WORKLOAD, seeds=[], variants=variants())


def test_variants_take_turns_in_changing_order():
    order = []

    def noted(name):
        return lambda module: lambda x: order.append(name) or module(x)

    names = ("eager", "inductor", "ditopt")
    seen = []
    result = bench(
        WORKLOAD,
        seeds=[1, 2],
        variants={name: noted(name) for name in names},
        observe=lambda variant, seed, result: seen.append((variant, seed)),
    )
    compiled, first, second, third = (order[i : i + 9 : 3] for i in range(0, 36, 9))
    assert compiled == first == list(names)
    rounds = [first, second, third]  # two seeds, timed in three rounds
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert seen[:3] == [(name, 1) for name in names]
    assert len(seen) == 6
    assert result.rows[0].seeds == (1, 2)


def test_a_plan_below_its_goal_withholds_every_speed():
    result = bench(WORKLOAD, plan(goal=41.0), variants=variants(planned=0.01))
    assert all(row.ms is None for row in result.rows)
    assert result.row("ditopt+plan").psnr_db == pytest.approx(40.0, abs=0.01)
    with pytest.raises(VerificationError, match=r"goal is 41 dB, but it reaches 40\.00 dB"):
        result.check()


@pytest.mark.parametrize(
    ("inductor", "ditopt", "accepted"),
    [
        (1e-2, 1.9e-2, True),  # within twice torch.compile's own distance
        (1e-2, 2.1e-2, False),
        (1e-6, 1e-3, True),  # far above its noise floor, yet below 8-bit rounding
        (1e-6, 1.2e-3, False),
    ],
)
def test_ditopt_without_a_plan_must_be_lossless(inductor, ditopt, accepted):
    result = bench(WORKLOAD, variants=variants(inductor=inductor, ditopt=ditopt))
    assert (not result.failures) == accepted
    if not accepted:
        assert "must be lossless" in result.failures[0]


@pytest.mark.parametrize(
    ("error", "goal", "failure"),
    [
        (1e-2, 39.0, None),
        (1e-2, 41.0, r"goal is 41 dB, but the engine reaches 40\.00 dB"),
        (1e-4, None, None),
        (1e-2, None, r"engine without a plan must be lossless, but is at 40\.0 dB"),
    ],
)
def test_an_engine_owes_its_plan_s_goal_or_losslessness(error, goal, failure):
    """Its own plan counts, whether or not that plan is measured beside it."""
    given = {**variants(), "engine": off_by(error)}
    own = None if goal is None else plan(goal)
    for beside in (None, plan(30.0)):
        result = bench(WORKLOAD, beside, variants=given, engine_plan=own)
        assert len(result.failures) == (failure is not None)
        if failure is not None:
            assert all(row.ms is None for row in result.rows)
            with pytest.raises(VerificationError, match=failure):
                result.check()


def test_an_engine_s_audit_seeds_are_the_default():
    given = {**variants(), "engine": off_by(1e-2)}
    assert bench(WORKLOAD, variants=given, engine_plan=plan(30.0)).rows[0].seeds == (7, 8)


def test_the_lossless_limit_is_that_of_8_bit_rounding():
    exact = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (torch.round(exact * 255) / 255 - exact).square().mean()
    assert -10 * torch.log10(error).item() == pytest.approx(ROUNDING_8_BIT_DB, abs=0.1)


def test_nan_from_a_variant_is_an_error():
    with pytest.raises(WorkloadError, match="NaN or infinite"):
        bench(WORKLOAD, variants=variants(ditopt=float("nan")))


def test_a_missing_plan_file_is_an_error(tmp_path):
    with pytest.raises(DitoptError, match=r"plan\.yaml"):
        bench(WORKLOAD, tmp_path / "plan.yaml", variants=variants())


def test_the_usual_variants_are_four_with_a_plan():
    assert list(default_variants(None)) == ["eager", "inductor", "ditopt"]
    assert list(default_variants(plan(30.0)))[-1] == "ditopt+plan"
