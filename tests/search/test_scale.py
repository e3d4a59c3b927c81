"""A search for a large model, without its sampling: 60 layers of 40 heads with 30 options."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ditopt.plan import Goal, Plan
from ditopt.profiling.schema import AttentionOption
from ditopt.search import Measured, find_plan

from .synthetic import PATTERNS, make_profile, save_linears

LAYERS, HEADS, OPTIONS, CALLS = 60, 40, 30, 50


class InstantSampler:
    """A loop of the predicted quality, in no time at all."""

    def __call__(self, plan: Plan, seeds: Sequence[int]) -> list[Measured]:
        assert plan.predicted is not None
        psnr_db = 200.0 if plan.predicted.psnr_db is None else plan.predicted.psnr_db - 1.5
        return [Measured(round(psnr_db, 2), plan.predicted.seconds) for _ in seeds]


@pytest.mark.slow
def test_a_search_for_a_large_model_takes_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = OPTIONS // 2
    options = (
        *(AttentionOption(pattern=p) for p in PATTERNS[:half]),
        *(AttentionOption(pattern=p, remainder="mean") for p in PATTERNS[1 : half + 1]),
    )
    assert len(options) == OPTIONS
    make_profile(tmp_path, layers=LAYERS, heads=HEADS, options=options, means=True, calls=CALLS)
    save_linears(tmp_path, LAYERS)
    start = time.process_time()
    found = find_plan(tmp_path, Goal(min_psnr_db=30.0), verify=InstantSampler())
    seconds = time.process_time() - start
    with capsys.disabled():
        print(f"\nsearch of {LAYERS} layers x {HEADS} heads x {OPTIONS} options: {seconds:.1f} s")
    assert found.plan.verification[-1].passed
    assert 30.0 <= found.plan.verification[-1].mean_psnr_db <= 31.8
    assert len(found.record.frontier) > 5
    assert seconds < 10.0  # of CPU time: the machine may be busy with something else
