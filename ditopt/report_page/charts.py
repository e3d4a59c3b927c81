"""Geometry of two charts: speed against quality, and predicted against measured quality.

The template draws them as SVG, so that they are there without a script and on paper.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditopt.report_page.decisions import EQUAL_DB

if TYPE_CHECKING:
    from ditopt.plan import Plan
    from ditopt.search.record import SearchRecord, Trial

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 22, 50


@dataclass(frozen=True)
class Axis:
    """A linear axis in pixels."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    unit: str

    def at(self, value: float) -> float:
        """Where a value lies, in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def labels(self) -> list[tuple[float, str]]:
        """Place and text of each tick."""
        return [(self.at(tick), f"{tick:g}{self.unit}") for tick in self.ticks]


@dataclass(frozen=True)
class Mark:
    """A point with what is told about it; `to` is the other end of a line, in pixels."""

    x: float
    y: float
    kind: str
    tip: str
    chosen: bool = False
    to: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """Everything that the template needs to draw one chart."""

    title: str
    x: Axis
    y: Axis
    x_name: str
    y_name: str
    marks: tuple[Mark, ...]
    line: str = ""
    goal_x: float | None = None
    goal_y: float | None = None
    width: int = _WIDTH
    height: int = _HEIGHT


def axis(values: Sequence[float], start: float, stop: float, unit: str) -> Axis:
    """An axis whose ticks are 1, 2 or 5 times a power of ten and that holds every value."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    ticks = tuple(round(number * step, 9) for number in range(first, last + 1))
    return Axis(low, high, start, stop, ticks, unit)


def pareto(search: SearchRecord, plan: Plan | None) -> Chart | None:
    """Predicted speed and quality of the frontier, and what sampling made of the trials."""
    points = sorted(
        (point for point in search.frontier if point.predicted_psnr_db < EQUAL_DB),
        key=lambda point: point.predicted_speedup,
    )
    trials = _drawn(search)
    if not points and not trials:
        return None
    goal = None if plan is None else plan.goal
    goal_x, goal_y = (None, None) if goal is None else (goal.target_speedup, goal.min_psnr_db)
    speeds = [p.predicted_speedup for p in points] + [t.predicted_speedup for t, _, _ in trials]
    decibels = [p.predicted_psnr_db for p in points]
    decibels += [value for _, *both in trials for value in both]
    x = axis([*speeds, *_known(goal_x)], _LEFT, _WIDTH - _RIGHT, "×")
    y = axis([*decibels, *_known(goal_y)], _HEIGHT - _BOTTOM, _TOP, "")
    marks = [
        Mark(
            x.at(point.predicted_speedup),
            y.at(point.predicted_psnr_db),
            "frontier",
            f"frontier: {point.predicted_speedup:.2f}× at {point.predicted_psnr_db:.1f} dB "
            f"predicted\n{point.full_calls} full calls, {point.density:.0%} of the blocks",
        )
        for point in points
    ]
    for trial, predicted, measured in trials:
        across = x.at(trial.predicted_speedup)
        ends = (across, y.at(predicted))
        marks.append(Mark(across, y.at(measured), trial.purpose, _tell(trial), trial.adopted, ends))
    corners = [f"{mark.x} {mark.y}" for mark in marks if mark.kind == "frontier"]
    return Chart(
        title="Speed against quality",
        x=x,
        y=y,
        x_name="speedup over dense, predicted",
        y_name="PSNR in dB",
        marks=tuple(marks),
        line="M" + "L".join(corners) if len(corners) > 1 else "",
        goal_x=None if goal_x is None else x.at(goal_x),
        goal_y=None if goal_y is None else y.at(goal_y),
    )


def scatter(search: SearchRecord) -> Chart | None:
    """Predicted against measured quality of every trial; on the diagonal they agree."""
    trials = _drawn(search)
    if not trials:
        return None
    decibels = [value for _, *both in trials for value in both]
    x = axis(decibels, _LEFT, _WIDTH - _RIGHT, "")
    y = axis(decibels, _HEIGHT - _BOTTOM, _TOP, "")
    return Chart(
        title="Predicted against measured",
        x=x,
        y=y,
        x_name="predicted PSNR in dB",
        y_name="measured PSNR in dB",
        marks=tuple(
            Mark(x.at(predicted), y.at(measured), trial.purpose, _tell(trial), trial.adopted)
            for trial, predicted, measured in trials
        ),
        line=f"M{x.at(x.low)} {y.at(y.low)}L{x.at(x.high)} {y.at(y.high)}",
    )


def _drawn(search: SearchRecord) -> list[tuple[Trial, float, float]]:
    """Trials with predicted and mean measured PSNR in dB, those that an axis has a place for."""
    return [
        (trial, trial.predicted_psnr_db, measured)
        for trial in search.trials
        if trial.predicted_psnr_db is not None and trial.predicted_psnr_db < EQUAL_DB
        if (measured := statistics.fmean(trial.measured_psnr_db)) < EQUAL_DB
    ]


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _tell(trial: Trial) -> str:
    each = ", ".join(f"{value:.1f}" for value in trial.measured_psnr_db)
    mean = statistics.fmean(trial.measured_psnr_db)
    return (
        f"{trial.purpose}{', the chosen plan' if trial.adopted else ''}\n"
        f"measured {mean:.1f} dB ({each}), predicted {trial.predicted_psnr_db:.1f} dB\n"
        f"predicted speedup {trial.predicted_speedup:.2f}×, {trial.full_calls} full calls, "
        f"{trial.density:.0%} of the blocks"
    )
