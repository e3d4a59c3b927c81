from __future__ import annotations

import importlib.util
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ditopt.caching import fit_rows, taylorseer
from ditopt.errors import PlanError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "caching.py"


@pytest.fixture(scope="module")
def caching() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_caching", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def curved_run(calls: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, calls, dtype=torch.float64)[:, None]
    a, b, e = torch.randn(3, 1, 60, generator=generator, dtype=torch.float64)
    noise = torch.randn(calls, 60, generator=generator, dtype=torch.float64)
    run = a + b * torch.exp(-5 * t) + e * torch.sin(4 * t) + 0.1 * noise
    return run @ run.T


def test_first_block_cache_by_hand(caching: ModuleType) -> None:
    changes = torch.tensor([[abs(s - t) * 0.1 for t in range(7)] for s in range(7)])
    assert caching.first_block_cache(changes, 0.25).full == (0, 3, 6)
    assert caching.first_block_cache(changes, 0.0).full == tuple(range(7))
    assert caching.first_block_cache(changes * torch.nan, 9.0).full == tuple(range(7))


def test_taylor_even_has_the_budget_and_the_published_rows(caching: ModuleType) -> None:
    for budget in range(1, 20):
        schedule = caching.taylor_even(20, budget, order=1)
        assert len(schedule.full) == budget
        assert (caching.refused(schedule) is None) == (budget not in (2, 3))
    assert caching.taylor_even(20, 8, order=2).full[:3] == (0, 1, 2)
    published = taylorseer(8, 3, first=3)
    assert caching.taylor_even(8, 4, order=1).rows[7] == pytest.approx(published.rows[7])


@pytest.mark.parametrize("budget", range(2, 24))
def test_speed_schedules_store_two_residuals(caching: ModuleType, budget: int) -> None:
    schedule = caching.spread_pairs(24, budget)
    assert len(schedule.full) == budget
    assert schedule.full[:2] == (0, 1)
    schedule.to_steps()


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_coherent_planner_equals_brute_force(caching: ModuleType, history: int, seed: int) -> None:
    calls, gram, forced = 7, curved_run(7, seed), (0, 1)
    amplitudes = [1.0 + 0.3 * ((seed + call) % 3) for call in range(calls)]

    def cost(full: tuple[int, ...]) -> float:
        rows, total, error = fit_rows(gram, full, history=history), 0.0, torch.zeros(calls).double()
        for call in range(calls + 1):
            if call == calls or call in full:  # a span of skips ends
                total += float(error @ gram @ error)
                error = torch.zeros(calls).double()
                continue
            error[call] += amplitudes[call]
            sources = [s for s in reversed(full) if s < call]
            for source, c in zip(sources, rows[call], strict=False):
                error[source] -= amplitudes[call] * c
        return total

    found = caching.planned_coherent(gram, amplitudes, forced=forced, history=history)
    assert [len(s.full) for s in found] == list(range(2, calls + 1))
    for schedule in found:
        rest = combinations(range(2, calls), len(schedule.full) - 2)
        best = min(cost((*forced, *more)) for more in rest)
        assert schedule.error == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert cost(schedule.full) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_relocations_keep_the_forced_calls_and_the_number(caching: ModuleType) -> None:
    found = caching.relocations((0, 1, 4, 9), 10, (0, 1, 9))
    assert set(found) == {(0, 1, k, 9) for k in (2, 3, 5, 6, 7)}


def test_limits_are_raised_until_one_serves(caching: ModuleType) -> None:
    def make(limit: int) -> str:
        if limit < 5:
            raise PlanError("too many full calls")
        return f"limit {limit}"

    assert caching.within(range(3, 9), make) == "limit 5"
    assert caching.within(range(3, 5), make) is None


def test_full_calls_for_a_speedup(caching: ModuleType) -> None:
    for target in (2.36, 3.17, 4.14):
        for share in (0.0, 0.02, 0.05):
            k = caching.calls_for_speedup(target, 50, share)
            assert caching.bound(50, k, share) >= target > caching.bound(50, k + 1, share)
    assert caching.calls_for_speedup(40.0, 50, 0.05) == 0


def test_claims_compare_with_the_best_baseline_within_the_budget(caching: ModuleType) -> None:
    def row(method: str, full: int, mean: float) -> dict[str, object]:
        return {"method": method, "budget": full, "full": tuple(range(full)), "mean_db": mean}

    rows = [
        row("A", 4, 20.0), row("A", 6, 25.0), row("B", 5, 24.0),
        row("planned", 4, 24.5), row("planned", 5, 25.0), row("planned", 6, 24.9),
    ]  # fmt: skip
    at = {claim["full_calls"]: claim for claim in caching.claims(rows)}
    assert (at[4]["best_baseline"], at[4]["lead_db"], at[4]["fewer"]) == ("A", 4.5, False)
    assert (at[5]["best_baseline"], at[5]["needs_for_its_psnr"], at[5]["fewer"]) == ("B", 4, True)
    assert (at[6]["lead_db"], at[6]["needs_for_its_psnr"], at[6]["fewer"]) == (-0.1, 5, True)
