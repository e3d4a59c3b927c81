"""`ExportReport`: what an export made, as a value and as the table that `ditopt export` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from ditopt.report import Decision


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        path: the engine's folder.
        format: `pt2`, `onnx` or `tensorrt`.
        sha256: of its manifest, for `expect_sha256`.
        nbytes: of the whole folder.
        programs: how many native programs it holds.
        mode: how torch exported the model: `non-strict` or `strict`.
        export_error: relative error of torch's export against the model.
        engine_error: largest relative error of the loaded engine against the model (without a
            plan) or against the compiled model with the plan, over the calls of a sampling loop.
        seconds: time by part.
        notes: what the engine does by other means than the compiled model.
        decisions: of every pass at every site.
    """

    path: Path
    format: str
    sha256: str
    nbytes: int
    programs: int
    mode: str
    export_error: float
    engine_error: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "sha256": self.sha256,
            "nbytes": self.nbytes,
            "programs": self.programs,
            "mode": self.mode,
            "export_error": self.export_error,
            "engine_error": self.engine_error,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "notes": list(self.notes),
            "decisions": [decision.to_json() for decision in self.decisions],
        }


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
