from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.caching import fit_row, fit_rows, forecast_error, newton_row


def smooth_run(calls: int = 12, size: int = 200, noise: float = 0.0, seed: int = 0) -> Tensor:
    """[T, n] residuals that move on a smooth curve."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, calls, dtype=torch.float64)[:, None]
    a, b, c, e = torch.randn(4, calls, size, generator=generator, dtype=torch.float64)
    return a[0] + b[0] * torch.exp(2 * t) + c[0] * torch.sin(5 * t) + noise * e


@pytest.mark.parametrize("sources", [[5], [5, 3], [5, 3, 2], [6, 1, 0]])
def test_error_from_the_gram_is_the_measured_error(sources: list[int]) -> None:
    run = smooth_run()
    row = fit_row(run @ run.T, 8, sources)
    combined = sum(c * run[s] for c, s in zip(row, sources, strict=True))
    measured = float((run[8] - combined).square().sum())
    assert forecast_error(run @ run.T, 8, sources, row) == pytest.approx(measured, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    st.floats(0, 1),
    st.floats(1.0, 8.0),
)
def test_fitted_rows_sum_to_one_within_their_gain(
    seed: int, calls: list[int], ridge: float, max_gain: float
) -> None:
    run = smooth_run(seed=seed, noise=0.3)
    sources = sorted(calls, reverse=True)
    row = fit_row(run @ run.T, 10, sources, ridge=ridge, max_gain=max_gain)
    assert sum(row) == pytest.approx(1.0, abs=1e-9)
    assert sum(map(abs, row)) <= max_gain + 1e-9


def test_constant_and_linear_residuals_are_forecast_exactly() -> None:
    a, b = torch.randn(2, 50, dtype=torch.float64)
    t = torch.arange(12, dtype=torch.float64)[:, None]
    constant, line = a.expand(12, 50), a + t * b
    for sources in ([5], [5, 2], [5, 2, 0]):
        row = fit_row(constant @ constant.T, 7, sources)
        assert forecast_error(constant @ constant.T, 7, sources, row) < 1e-9
    for sources in ([5, 2], [5, 2, 0]):
        gram = line @ line.T
        row = fit_row(gram, 7, sources)
        assert forecast_error(gram, 7, sources, row) < 1e-9 * float(gram[7, 7])
        ramp = sum(c * s for c, s in zip(row, sources, strict=True))
        assert ramp == pytest.approx(7.0)  # rises from 5, by the right amount


def test_without_ridge_no_row_of_its_family_is_better() -> None:
    run = smooth_run(noise=0.2)
    gram, sources = run @ run.T, [6, 5, 3]
    fitted = forecast_error(gram, 9, sources, fit_row(gram, 9, sources, ridge=0, max_gain=1e9))
    rivals = [(1.0, 0.0, 0.0), newton_row(9, sources), (*newton_row(9, sources[:2]), 0.0)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        a, b = (2 * torch.randn(2, generator=generator)).tolist()
        rivals.append((1 - a - b, a, b))
    assert all(fitted <= forecast_error(gram, 9, sources, row) + 1e-9 for row in rivals)


def test_ridge_leads_to_the_straight_line() -> None:
    run = smooth_run(noise=1.0)
    row = fit_row(run @ run.T, 9, [6, 3], ridge=1e9, max_gain=1e9)
    assert row == pytest.approx(newton_row(9, [6, 3]), abs=1e-6)


def test_a_held_out_run_gains_from_fitting() -> None:
    train = sum((r := smooth_run(seed=s, noise=0.5)) @ r.T for s in range(4))
    test = smooth_run(seed=9, noise=0.5)
    gram = test @ test.T
    fitted = forecast_error(gram, 9, [7, 6], fit_row(train, 9, [7, 6]))
    assert fitted < forecast_error(gram, 9, [7, 6], newton_row(9, [7, 6]))
    assert fitted < forecast_error(gram, 9, [7], (1.0,))


def test_fit_rows_uses_the_newest_history() -> None:
    run = smooth_run()
    rows = fit_rows(run @ run.T, [0, 1, 4, 8], history=3)
    assert {call: len(row) for call, row in rows.items()} == {
        2: 2, 3: 2, 5: 3, 6: 3, 7: 3, 9: 3, 10: 3, 11: 3,
    }  # fmt: skip
    assert rows[9] == fit_row(run @ run.T, 9, [8, 4, 1])
