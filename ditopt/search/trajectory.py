"""What an error at one call is worth for the result.

A relative error r_t of the model's output at call t moves the sample by ``s_t r_t``, where s_t is
the size of that step (`SeedRecord.step_energy`), and what it moves grows with the signal until the
last call: ``g_t = s_t exp(GROWTH (1 - t / T))``. Between noise and a mode of the data of variance
v, a flow ``x = (1 - t) data + t noise`` stretches every deviation by ``v^0.5 / ((1 - t)^2 v +
t^2)^0.5``, about ``1 / (1 - t)``: early errors count most.

What is wrong at a full call is in its residual, and so in every call that is forecast from it:
``u_j = sum_t g_t c_tj``, with the coefficients c of forecasts, is what a full call j is worth.
Extrapolation makes u large: fewer full calls, more damage by each.

Rounding errs in another direction at every call, so energies add up: ``sum_j u_j^2 r_j^2``. A
pattern drops the same blocks at every call, and what they held changes slowly: a share COHERENCE of
its error adds up as amplitudes, ``(sum_j u_j r_j)^2``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ditopt.caching.fit import forecast_error

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule
    from ditopt.profiling.schema import Profile, SeedRecord
    from ditopt.search.sensitivity import Floats


GROWTH = 2.5
"""Logarithm of how much a deviation at the first call grows until the last."""

COHERENCE = 0.5
"""Share of a pattern's error that has one direction at all calls.

Both, and the gains that a search starts from, were fitted to 25 random plans of the embedded video
model (rank correlation of predicted and measured quality 0.96, prediction_cpu.json in
benchmarks/results); for 50 other plans it is 0.93, and was 0.86 before there was coherence
(prediction_h200.json), which is what suggested it."""


def step_sizes(record: SeedRecord) -> Floats:
    """[T] amplitude by which an error at each call moves the result."""
    steps = np.asarray(record.step_energy.sqrt().numpy(), dtype=np.float64)
    calls = len(steps)
    left = 1 - np.arange(calls) / max(1, calls - 1)
    grown: Floats = steps * np.exp(GROWTH * left)
    return grown


def call_moves(
    record: SeedRecord,
    first: int,
    schedule: CacheSchedule | None = None,
    stop: int | None = None,
) -> Floats:
    """[T] ``u_j`` of the full calls from `first` up to `stop`, 0 for all others.

    Without a schedule every call is full, and worth what it moves itself.
    """
    worth = step_sizes(record)
    if schedule is not None and schedule.rows:
        sizes, worth = worth, np.zeros(len(worth))
        for call in schedule.full:
            worth[call] = sizes[call]
        for call, row in schedule.rows.items():
            for source, coefficient in zip(sources(schedule, call), row, strict=False):
                worth[source] += sizes[call] * coefficient
    worth[:first] = 0.0
    if stop is not None:
        worth[stop:] = 0.0
    return worth


def pattern_energy(moves: Floats, between: Floats, error: Floats) -> Floats:
    """Energy of what patterns drop.

    Args:
        moves: [T] of `call_moves`.
        between: [T, O] of `between_observed`.
        error: [O, ...] relative squared errors at the observed calls.
    """
    at_once: Floats = np.tensordot(moves @ between, np.sqrt(error), axes=1) ** 2
    one_by_one: Floats = np.tensordot(moves**2 @ between, error, axes=1)
    return COHERENCE * at_once + (1 - COHERENCE) * one_by_one


def sources(schedule: CacheSchedule, call: int) -> list[int]:
    """The full calls that a call is forecast from, newest first."""
    return [full for full in reversed(schedule.full) if full < call]


def between_observed(profile: Profile) -> Floats:
    """[T, O] weights that interpolate what observed calls say to every call."""
    observed = np.array(profile.observed_calls, dtype=np.float64)
    calls = np.arange(profile.sampler.calls, dtype=np.float64)
    unit = np.eye(len(observed))
    return np.stack([np.interp(calls, observed, row) for row in unit], axis=1)


def call_worth(record: SeedRecord) -> Floats:
    """[T] what a unit of squared error of the block stack's output is worth at each call.

    A forecast that errs by the whole hidden state spoils the whole step.
    """
    hidden = np.maximum(record.hidden_energy.numpy(), 1e-30)
    worth: Floats = step_sizes(record) ** 2 / hidden
    return worth


def cache_energy(record: SeedRecord, schedule: CacheSchedule) -> float:
    """Energy that a schedule's forecasts add, in units of the sampled tensor squared."""
    worth = call_worth(record)
    total = 0.0
    for call, row in schedule.rows.items():
        stored = sources(schedule, call)[: len(row)]
        total += float(worth[call]) * forecast_error(record.gram, call, stored, row)
    return total
