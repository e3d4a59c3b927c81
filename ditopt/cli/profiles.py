"""`inspect` and `profile`: what is in a model, and what it does along the denoising loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli.common import JsonPath, WorkloadSpec, show
from ditopt.progress import terminal_progress


def inspect(workload: WorkloadSpec, json_path: JsonPath = None) -> None:
    """List the attention and linear sites of the model that the workload calls."""
    from ditopt.inspection import inspect_workload
    from ditopt.workload import load_workload

    loaded = load_workload(workload)
    with terminal_progress() as progress:
        progress("capturing the model", 0, 1)
        report = inspect_workload(loaded)
    show(report.table(), report.to_json(), json_path)


def profile(
    workload: WorkloadSpec,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")],
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Loops to record.")] = 2,
    linears: Annotated[
        bool, typer.Option("--linears", help="Number formats of linear layers, too.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Run the denoising loop and measure every site; an interrupted profile resumes."""
    from ditopt.profiling import profile as measure
    from ditopt.workload import load_workload

    loaded = load_workload(workload)
    try:
        with terminal_progress() as progress:
            result = measure(loaded, out, seeds, progress, source=loaded.origin)
            if linears:
                from ditopt.profiling.linears import profile_linears

                profile_linears(loaded, out, progress)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes the profile", err=True)
        raise
    show(f"Profile written to {out}.", result.model_dump(mode="json"), json_path)
