"""The Pareto table: the fastest plan for each quality, as predicted, with what was sampled."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ditopt.search.plans import plan_of
from ditopt.search.record import FrontierPoint

if TYPE_CHECKING:
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Predictor
    from ditopt.search.record import SearchRecord

_LEVELS_DB = tuple(range(50, 18, -2))


def frontier(predictor: Predictor, model: ErrorModel) -> tuple[FrontierPoint, ...]:
    """The fastest candidates for a range of qualities, best quality first, equal ones once."""
    found: list[FrontierPoint] = []
    for level_db in _LEVELS_DB:
        candidate = predictor.fastest(model, level_db, roughly=True)
        if candidate is None or math.isinf(model.psnr_db(candidate.energies)):
            continue
        predicted = plan_of(candidate, predictor, model, None).predicted
        assert predicted is not None
        assert predicted.psnr_db is not None
        point = FrontierPoint(
            predicted_speedup=predicted.speedup,
            predicted_psnr_db=predicted.psnr_db,
            full_calls=len(candidate.schedule.full),
            density=predicted.density,
        )
        if not found or point.predicted_speedup > found[-1].predicted_speedup:
            found.append(point)
    return tuple(found)


def pareto_table(record: SearchRecord) -> Table:
    """Predictions of the frontier, then every plan that was sampled; the adopted one is marked."""
    table = Table(
        title=f"Fastest plans by quality, as predicted; sampled plans for {record.goal}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for header in ("plan", "speed", "PSNR predicted", "PSNR measured (worst)", "full calls"):
        table.add_column(header, justify="left" if header == "plan" else "right", no_wrap=True)
    table.add_column("blocks kept", justify="right", no_wrap=True)
    for point in record.frontier:
        table.add_row(
            "predicted",
            f"{point.predicted_speedup:.2f}x",
            f"{point.predicted_psnr_db:.1f} dB",
            "",
            str(point.full_calls),
            f"{point.density:.0%}",
        )
    for trial in record.trials:
        predicted, measured = trial.predicted_psnr_db, trial.measured_psnr_db
        table.add_row(
            f"{trial.purpose}{', adopted' if trial.adopted else ''}",
            f"{trial.predicted_speedup:.2f}x",
            "" if predicted is None else f"{predicted:.1f} dB",
            f"{statistics.fmean(measured):.1f} dB ({min(measured):.1f})",
            str(trial.full_calls),
            f"{trial.density:.0%}",
        )
    return table
