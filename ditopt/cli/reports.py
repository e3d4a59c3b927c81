"""`report`: a profile and its plan as a page for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli.common import JsonPath, ProfileDir, can_be_written, show
from ditopt.progress import terminal_progress


def report(
    profile_dir: ProfileDir,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Page to write (html).", callback=can_be_written
        ),
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="A plan made from the profile.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", metavar="WORKLOAD", help="What was profiled, where the profile is moved."
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Compile with the plan and list every decision.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Write one self-contained page: choices, maps, steps, search, frames, decisions."""
    from ditopt.report_page import write_report

    with terminal_progress() as progress:
        written = write_report(
            profile_dir, out, plan, workload=workload, explain=explain, progress=progress
        )
    show(written.text(), written.to_json(), json_path)
