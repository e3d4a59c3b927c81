"""What a bench measured, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ditopt.bench_result import BenchResult, Row


def bench_table(result: BenchResult) -> Group:
    """One row per variant, the noise floor, and where it was measured."""
    where = result.environment
    title = f"{where['workload']}: one sampling loop"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for header in ("time (IQR)", "speed", "PSNR (worst)", "SSIM", "max error"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("compile", "memory", "calls full+skipped"):
        table.add_column(header, justify="right", no_wrap=True)
    inductor = next((row.ms for row in result.rows if row.variant == "inductor"), None)
    for row in result.rows:
        table.add_row(*_cells(row, inductor))
    seeds = len(result.rows[0].seeds)
    lines = [
        "Speed is inductor's time over the variant's, from interleaved rounds.",
        f"PSNR (mean of decibels) and SSIM are against eager on the same {seeds} seeds.",
        _noise_floor(result),
        f"{where['name']}, {where['threads']} threads, torch {where['torch']}, {where['date']}",
        *(f"withheld: {failure}" for failure in result.failures),
    ]
    return Group(table, *(Text(line) for line in lines if line))


def _cells(row: Row, inductor_ms: float | None) -> list[str]:
    speedup = "" if row.ms is None or inductor_ms is None else f"{inductor_ms / row.ms:.2f}x"
    return [
        row.variant,
        _time(row),
        speedup,
        _quality(row),
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


def _time(row: Row) -> str:
    if row.ms is None or row.ms_iqr is None:
        return "withheld"
    scale, unit = (1e3, "s") if row.ms >= 1e3 else (1.0, "ms")
    return f"{row.ms / scale:.3g} {unit} ({row.ms_iqr / scale:.2g})"


def _quality(row: Row) -> str:
    if row.psnr_min_db is None:
        return _decibels(row.psnr_db)
    return f"{_decibels(row.psnr_db)} ({row.psnr_min_db:.1f})"


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _paths(ran: Mapping[str, Any]) -> str:
    full, skipped = ran.get("full_steps", 0), ran.get("skipped_steps", 0)
    return f"{full}+{skipped}" if full or skipped else ""
