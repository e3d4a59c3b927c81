"""Forecast rows fitted to recorded residuals, in closed form, from their Gram matrix alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditopt.caching.rows import newton_row

# Forecasts amplify the noise of stored residuals by up to sum |c|. Fitted rows stay below this;
# it is reached only where the recorded runs hardly constrain the row.
DEFAULT_GAIN = 5.0

# Pull towards the straight line, relative to the size of the differences between stored residuals.
# It decides where they are (nearly) parallel, and is negligible elsewhere.
DEFAULT_RIDGE = 1e-3


def forecast_error(gram: Tensor, call: int, sources: Sequence[int], row: Sequence[float]) -> float:
    """Squared norm of `R_call - sum_j row[j] * R_sources[j]`.

    Args:
        gram: [T, T] inner products of residuals.
        call: whose residual is forecast.
        sources: full calls whose residuals are combined.
        row: their coefficients.
    """
    weights = gram.new_zeros(gram.shape[0])
    weights[call] += 1.0
    for source, c in zip(sources, row, strict=True):
        weights[source] -= c
    return float((weights @ gram @ weights).clamp(min=0.0))  # rounding may go below 0


def fit_row(
    gram: Tensor,
    call: int,
    sources: Sequence[int],
    *,
    ridge: float = DEFAULT_RIDGE,
    max_gain: float = DEFAULT_GAIN,
    times: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The row that forecasts one call best on the recorded runs.

    Minimises `||R_t - sum_j c_j R_j||^2 + mu ||c - c_0||^2` subject to `sum_j c_j = 1`, with c_0
    the straight line through the two newest residuals and mu = ridge times the mean squared
    difference between stored residuals. (L2P, arXiv 2604.26365, trains such weights by gradient
    descent.) A row whose gain sum |c| is too large is moved towards reuse, which has gain 1.

    Args:
        gram: [T, T] inner products, summed over runs, branches and streams as they should count.
        call: t, whose residual is forecast.
        sources: full calls before t, newest first.
        ridge: strength of the pull towards the straight line.
        max_gain: largest sum |c|.
        times: [T] time of each call for the straight line; the call index if None.
    """
    count = len(sources)
    clock = range(gram.shape[0]) if times is None else times
    line = newton_row(clock[call], [clock[source] for source in sources[:2]])
    start = torch.tensor([*line, *[0.0] * (count - len(line))], dtype=torch.float64)
    if count > 1:
        # c = start + Z y with Z' 1 = 0: differences to the newest residual.
        basis = torch.eye(count, dtype=torch.float64)[:, 1:].clone()
        basis[0] = -1.0
        index = torch.tensor(list(sources))
        stored, target = gram[index][:, index].double(), gram[index, call].double()
        normal = basis.T @ stored @ basis
        pull = ridge * normal.diagonal().mean() * (basis.T @ basis)
        step = torch.linalg.lstsq(
            normal + pull, (basis.T @ (target - stored @ start))[:, None], driver="gelsd"
        ).solution[:, 0]
        start = start + basis @ step
    return _limit_gain(tuple(start.tolist()), max_gain)


def _limit_gain(row: tuple[float, ...], max_gain: float) -> tuple[float, ...]:
    """The point nearest to `row` on the way from reuse whose gain is allowed."""

    def towards(share: float) -> tuple[float, ...]:
        return tuple(share * c + (1.0 - share) * (j == 0) for j, c in enumerate(row))

    if sum(map(abs, row)) <= max_gain:
        return row
    low, high = 0.0, 1.0  # the gain is convex in the share and 1 at 0: bisection finds the bound
    for _ in range(60):
        middle = (low + high) / 2
        if sum(map(abs, towards(middle))) <= max_gain:
            low = middle
        else:
            high = middle
    return towards(low)


def fit_rows(
    gram: Tensor,
    full: Sequence[int],
    *,
    history: int = 2,
    ridge: float = DEFAULT_RIDGE,
    max_gain: float = DEFAULT_GAIN,
) -> dict[int, tuple[float, ...]]:
    """One fitted row for every skip call of a given schedule.

    Args:
        gram: [T, T] inner products.
        full: full calls, ascending from 0.
        history: m, how many residuals a row may combine.
        ridge: as for `fit_row`.
        max_gain: as for `fit_row`.
    """
    running = set(full)
    rows = {}
    for call in range(gram.shape[0]):
        if call not in running:
            sources = [source for source in reversed(full) if source < call][:history]
            rows[call] = fit_row(gram, call, sources, ridge=ridge, max_gain=max_gain)
    return rows
