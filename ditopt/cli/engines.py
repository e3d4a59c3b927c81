"""`export` and `run`: engines written, and sampled with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli.common import EnginePath, JsonPath, Sha256, WorkloadSpec, can_be_written, show
from ditopt.progress import terminal_progress


def export(
    workload: WorkloadSpec,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")],
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="The plan to build in.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="pt2, onnx or tensorrt.")
    ] = "pt2",
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Which denoiser, of several.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", metavar="N", help="Of an ONNX model; 23 unless told.")
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option("--dynamic", metavar="WHAT", help="batch,resolution: sizes left open."),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Write the model, with its plan, as an engine: a folder that another process runs."""
    from ditopt.export.report import export_table
    from ditopt.export.run import export as write
    from ditopt.export.sizes import parse
    from ditopt.workload import load_workload

    open_sizes = () if dynamic is None else parse(dynamic)
    loaded, options = load_workload(workload), {} if opset is None else {"opset": opset}
    with terminal_progress() as progress:
        report = write(
            loaded,
            out,
            plan,
            format=format,
            model=model,
            dynamic=open_sizes,
            options=options,
            progress=progress,
        )
    show(export_table(report), report.to_json(), json_path)


def run(
    workload: WorkloadSpec,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="png, gif or mp4 to write.", callback=can_be_written
        ),
    ],
    engine: EnginePath = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the sampling loop.")] = 0,
    expect_sha256: Sha256 = None,
    json_path: JsonPath = None,
) -> None:
    """Sample once, with an engine in the model's place or with the model itself; draw it."""
    from ditopt.export.sample import sample_to_file
    from ditopt.workload import load_workload

    loaded = load_workload(workload)
    with terminal_progress() as progress:
        result = sample_to_file(
            loaded, engine, out, seed=seed, expect_sha256=expect_sha256, progress=progress
        )
    show(f"Seed {seed} in {result['ms']:.0f} ms, written to {out}.", result, json_path)
