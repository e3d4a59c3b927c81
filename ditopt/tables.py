"""What a bench measured, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ditopt.bench import BenchResult, Row


def bench_table(result: BenchResult) -> Group:
    """One row per variant, the noise floor, and where it was measured."""
    where = result.environment
    table = Table(title=f"{where['workload']}: one sampling loop", title_justify="left")
    table.add_column("variant")
    for header in ("time", "IQR", "vs inductor", "PSNR", "worst", "SSIM", "max error"):
        table.add_column(header, justify="right")
    for header in ("compile", "peak memory", "full / skipped calls"):
        table.add_column(header, justify="right")
    inductor = next((row.ms for row in result.rows if row.variant == "inductor"), None)
    for row in result.rows:
        table.add_row(*_cells(row, inductor))
    seeds = len(result.rows[0].seeds)
    lines = [
        f"PSNR and SSIM against eager on the same seeds ({seeds}); the mean is of decibels.",
        _noise_floor(result),
        f"{where['name']}, {where['threads']} threads, torch {where['torch']}, {where['date']}",
        *(f"withheld: {failure}" for failure in result.failures),
    ]
    return Group(table, *(Text(line) for line in lines if line))


def _cells(row: Row, inductor_ms: float | None) -> list[str]:
    withheld = row.ms is None or row.ms_iqr is None
    speedup = "" if row.ms is None or inductor_ms is None else f"{inductor_ms / row.ms:.2f}x"
    return [
        row.variant,
        "withheld" if withheld else _time(row.ms or 0.0),
        "" if withheld else _time(row.ms_iqr or 0.0),
        speedup,
        _decibels(row.psnr_db),
        _decibels(row.psnr_min_db),
        f"{row.ssim:.4f}",
        f"{row.max_error:.2e}",
        f"{row.compile_s:.1f} s",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
        _paths(row.ran),
    ]


def _noise_floor(result: BenchResult) -> str:
    rows = [row for row in result.rows if row.variant == "inductor"]
    if not rows:
        return ""
    return f"Noise floor, torch.compile against eager: PSNR {_decibels(rows[0].psnr_db)}."


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.2f} ms"


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _paths(ran: Mapping[str, Any]) -> str:
    full, skipped = ran.get("full_steps", 0), ran.get("skipped_steps", 0)
    return f"{full} / {skipped}" if full or skipped else ""
