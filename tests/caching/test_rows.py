from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditopt.caching import foca_row, newton_row, taylor_row

# Full calls, newest first, and a later skip call; gaps are uneven.
histories = st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(
    lambda calls: sorted(calls, reverse=True)
)


def apply(row: tuple[float, ...], stored: list[int], curve: object) -> float:
    return math.fsum(c * curve(t) for c, t in zip(row, stored, strict=False))


@given(histories, st.integers(1, 6), st.integers(0, 3))
def test_rows_sum_to_one(stored: list[int], ahead: int, order: int) -> None:
    call = stored[0] + ahead
    newton, taylor = newton_row(call, stored), taylor_row(call, stored, order)
    assert sum(newton) == pytest.approx(1.0, abs=1e-6 * sum(map(abs, newton)))
    assert sum(taylor) == pytest.approx(1.0, abs=1e-9 * sum(map(abs, taylor)))
    assert len(taylor) == min(len(stored), order + 1)


@given(histories, st.integers(1, 6))
def test_newton_is_exact_for_polynomials_through_its_points(stored: list[int], ahead: int) -> None:
    call, row = stored[0] + ahead, newton_row(stored[0] + ahead, stored)
    for power in range(len(stored)):
        scale = max(abs(c) * t**power for c, t in zip(row, stored, strict=True)) or 1.0
        error = apply(row, stored, lambda t, p=power: float(t**p)) - call**power
        assert abs(error) <= 1e-9 * scale


@given(histories, st.integers(1, 6), st.integers(1, 3))
def test_taylor_is_exact_for_lines_and_a_rising_ramp_rises(
    stored: list[int], ahead: int, order: int
) -> None:
    call = stored[0] + ahead
    row = taylor_row(call, stored, order)
    ramp = apply(row, stored, lambda t: 3.0 * t)
    if len(stored) == 1:
        assert ramp == 3.0 * stored[0]
    else:
        assert ramp == pytest.approx(3.0 * call)
        assert ramp > 3.0 * stored[0]


def test_orders_differ_from_two_on() -> None:
    stored = [7, 4, 2]
    assert taylor_row(9, stored, 1) == pytest.approx(newton_row(9, stored[:2]))
    assert taylor_row(9, stored, 2) != pytest.approx(newton_row(9, stored))


def test_taylor_row_by_hand() -> None:
    # Full calls 0, 2, 4: first differences (f4 - f2) / 2 and (f2 - f0) / 2, second by gap 2 again.
    second = [1 / 4, -1 / 2, 1 / 4]
    expected = [1 + 3 / 2 + 4.5 * second[0], -3 / 2 + 4.5 * second[1], 4.5 * second[2]]
    assert taylor_row(7, [4, 2, 0], 2) == pytest.approx(expected)


@given(histories, st.integers(1, 9))
def test_foca_follows_the_line_and_then_holds_it(stored: list[int], ahead: int) -> None:
    row = foca_row(stored[0] + ahead, stored)
    assert sum(row) == pytest.approx(1.0)
    reached = stored[0] + min(ahead, 3) if len(stored) > 1 else stored[0]
    assert apply(row, stored, lambda t: 3.0 * t) == pytest.approx(3.0 * reached)
    if ahead <= 3:
        assert row == pytest.approx(newton_row(stored[0] + ahead, stored[:2]))
