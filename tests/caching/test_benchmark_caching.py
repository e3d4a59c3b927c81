"""The benchmark's own arithmetic, and its published caches against what they must reduce to."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def folders() -> Any:
    added = [str(ROOT / "benchmarks" / "caching"), str(ROOT / "examples")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def model() -> Any:
    from tiny_video.model import VideoDiT, VideoDiTConfig

    torch.manual_seed(0)
    config = VideoDiTConfig(
        width=32, layers=3, heads=2, ff_ratio=2, condition_width=8, rope_axes=(4, 6, 6)
    )
    model = VideoDiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model: Any, calls: int = 6) -> torch.Tensor:
    """A loop of Euler steps on a clip of 8 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 2, 8, 8, generator=generator)
    text = torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        for call in range(calls):
            time = torch.full((2,), 1000.0 * (1 - call / calls))
            x = x - model(x, time, text) / calls
    return x


def test_full_calls_for_a_speedup() -> None:
    loops = import_module("loops")
    for target in (2.36, 3.17, 4.14):
        for share in (0.0, 0.02, 0.05):
            k = loops.calls_for_speedup(target, 50, share)
            assert loops.bound(50, k, share) >= target > loops.bound(50, k + 1, share)
    assert loops.calls_for_speedup(40.0, 50, 0.05) == 0


@pytest.mark.parametrize("budget", range(2, 24))
def test_speed_schedules_store_two_residuals(budget: int) -> None:
    schedule = import_module("loops").spread_pairs(24, budget)
    assert len(schedule.full) == budget
    assert schedule.full[:2] == (0, 1)
    schedule.to_steps()


@pytest.mark.parametrize("name", ["first block", "tea", "taylor", "smooth"])
def test_published_caches_that_never_skip_change_nothing(name: str, model: Any) -> None:
    published = import_module("published")
    every = dict.fromkeys(published.MODULES, range(6))

    def make(blocks: Any) -> Any:
        if name == "first block":
            return published.OnlineFirstBlockCache(blocks, 6, 0.0)
        if name == "tea":
            return published.OnlineTeaCache(blocks, 6, 0.0, (1.0, 0.0))
        return published.ModularCache(blocks, every, order=int(name == "taylor"))

    expected = run(model)
    with published.in_place_of_blocks(model, make) as stack:
        assert torch.allclose(run(model), expected, atol=1e-5)
    assert stack.full_calls == 6
    assert len(model.blocks) == 3
    assert torch.equal(run(model), expected)


def test_published_caches_skip_what_they_are_told_to(model: Any) -> None:
    published = import_module("published")
    ran: list[int] = []
    hook = model.blocks[2].ff.register_forward_hook(lambda *_: ran.append(1))
    make = [
        (lambda blocks: published.OnlineFirstBlockCache(blocks, 6, 1e9), 1),
        (lambda blocks: published.OnlineTeaCache(blocks, 6, 1e9, (1.0, 0.0)), 2),
        (
            lambda blocks: published.ModularCache(
                blocks, {"attn1": (0, 3), "attn2": (0,), "ff": (0, 2, 4)}, order=1
            ),
            3,
        ),
    ]
    for one, expected in make:
        ran.clear()
        with published.in_place_of_blocks(model, one):
            run(model)
        assert len(ran) == expected
    hook.remove()


def test_a_branch_extrapolates_a_ramp_by_its_order() -> None:
    published = import_module("published")
    clock = published.Stack(torch.nn.ModuleList())
    values = iter([1.0, 3.0])
    source = torch.nn.Identity()
    source.forward = lambda: torch.tensor([next(values)])  # type: ignore[method-assign]
    branch = published.Branch(source, clock, (0, 2), order=1)
    seen = []
    for clock.call in range(5):
        seen.append(float(branch()))
    assert seen == [1.0, 1.0, 3.0, 4.0, 5.0]  # slope 1 between calls 0 and 2


def test_recorded_changes_by_type(model: Any) -> None:
    published = import_module("published")
    with published.in_place_of_blocks(model, published.ModuleRecorder) as recorder:
        run(model)
    for table in recorder.changes(reach=2).values():
        assert table.shape == (6, 6)
        assert torch.equal(table.diagonal(), torch.zeros(6).double())
        assert float(table[0, 2]) > 0
        assert float(table[0, 3]) == float("inf")


def test_batched_samples_are_the_workload_s_own() -> None:
    batch, workload = import_module("batch"), import_module("tiny_video.workload").workload
    from tiny_video.sampler import conditions_of, denoise, guided_conditions, load_checkpoint

    made = workload(device="cpu", dtype=torch.float32)
    shape = (3, 1, 8, 8)
    _, conditions = load_checkpoint()
    together = list(batch.sample_together(made.model, [3, 12], made.model, shape))
    for seed, clip in zip((3, 12), together, strict=True):
        tokens = guided_conditions(conditions, *conditions_of(seed))
        alone = denoise(made.model, tokens, seed, shape=shape)
        torch.testing.assert_close(clip, alone, atol=1e-3, rtol=1e-3)


def row(method: str, budget: int, full: float, mean: float) -> dict[str, Any]:
    return {"method": method, "budget": budget, "full_calls": full, "mean_db": mean}


def test_claims_compare_with_the_best_baseline_within_the_budget() -> None:
    rows = [
        row("A", 4, 4, 20.0), row("A", 6, 6, 25.0), row("B", 5, 4.6, 24.0),
        row("planned", 4, 4, 24.5), row("planned", 5, 5, 25.0), row("planned", 6, 6, 24.9),
    ]  # fmt: skip
    at = {claim["budget"]: claim for claim in import_module("merge").claims(rows)}
    assert (at[4]["best_baseline"], at[4]["lead_db"], at[4]["full_calls_for_its_psnr"]) == (
        "A",
        4.5,
        4,
    )
    assert (at[5]["best_baseline"], at[5]["full_calls_for_its_psnr"]) == ("B", 4)
    assert (at[6]["lead_db"], at[6]["full_calls_for_its_psnr"]) == (0.0, 5)


def test_merging_refuses_other_seeds() -> None:
    merge = import_module("merge")
    one = {"dtype": "float32", "seeds": [1], "calls": 20, "rows": [], "rollouts": 1}
    part = {"environment": {}, "quality": [one]}
    assert merge.merged([part, part])["quality"][0]["rollouts"] == 2
    with pytest.raises(SystemExit, match="different seeds"):
        merge.merged([part, {"environment": {}, "quality": [{**one, "seeds": [2]}]}])
