"""The table that `ditopt export` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from ditopt.export.run import ExportReport


def export_table(report: ExportReport) -> Table:
    """What was written, how it was checked, and what it gave up."""
    table = Table(show_header=False)
    table.add_row("engine", str(report.path))
    table.add_row("manifest sha256", report.sha256)
    table.add_row("programs", f"{report.programs} ({report.format})")
    table.add_row("size", f"{report.nbytes / 1e6:.1f} MB")
    table.add_row("torch.export against the model", f"{report.export_error:.1e} ({report.mode})")
    table.add_row("engine against its model", f"{report.engine_error:.1e} relative")
    table.add_row("time", ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items()))
    for note in report.notes:
        table.add_row("note", note)
    return table
