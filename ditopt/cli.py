"""The command line: inspect, profile, plan, explain, export, run, bench, demo.

Every command prints a table; `--json PATH` writes the same as JSON (`-` for standard output, and
then nothing else goes there). Bad input ends with one line that says what is wrong, and code 2.
Commands import what they need when they run, so that `ditopt --help` answers at once.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from ditopt.errors import DitoptError, DitoptWarning
from ditopt.files import check_writable, write_json
from ditopt.progress import terminal_progress

_MIN_WIDTH = 120  # columns; narrower tables would break every number in two

_python_format = warnings.formatwarning

app = typer.Typer(
    help="Profile a Diffusion Transformer, plan its optimization, apply and measure the plan.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _can_be_written(path: Any) -> Any:
    """Refuse a file whose folder is missing now, not after minutes of work."""
    if path is not None and str(path) != "-":
        check_writable(path)
    return path


WorkloadSpec = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD", help="path/to/file.py[:function] or diffusers:PATH", show_default=False
    ),
]
JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH",
        help="Write the result as JSON; - for standard output.",
        callback=_can_be_written,
    ),
]
PlanPath = Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan to apply.")]
EnginePath = Annotated[
    Path | None,
    typer.Option("--engine", metavar="DIR", help="An engine that `ditopt export` wrote."),
]
Sha256 = Annotated[
    str | None,
    typer.Option("--expect-sha256", metavar="HEX", help="sha256 of the engine's manifest."),
]
MinPsnr = Annotated[
    float | None, typer.Option("--min-psnr", metavar="DB", help="Quality to keep, mean PSNR in dB.")
]


@app.command()
def inspect(workload: WorkloadSpec, json_path: JsonPath = None) -> None:
    """List the attention and linear sites of the model that the workload calls."""
    from ditopt.inspection import inspect_workload
    from ditopt.workload import load_workload

    loaded = load_workload(workload)
    with terminal_progress() as progress:
        progress("capturing the model", 0, 1)
        report = inspect_workload(loaded)
    _show(report.table(), report.to_json(), json_path)


@app.command()
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
    _show(f"Profile written to {out}.", result.model_dump(mode="json"), json_path)


@app.command()
def plan(
    profile_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `ditopt profile` wrote.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Plan file to write.", callback=_can_be_written
        ),
    ],
    min_psnr: MinPsnr = None,
    target_speedup: Annotated[
        float | None, typer.Option("--target-speedup", metavar="X", help="Dense time over plan's.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Search the fastest plan that keeps a quality (30 dB unless told), or the best of a speed."""
    from ditopt.plan import Goal
    from ditopt.search import plan_from_profile

    if min_psnr is None and target_speedup is None:
        min_psnr = 30.0
    goal = Goal(min_psnr_db=min_psnr, target_speedup=target_speedup)
    with terminal_progress() as progress:
        found = plan_from_profile(profile_dir, goal, out, progress=progress)
    _show(f"Plan written to {out}.", found.model_dump(mode="json"), json_path)


@app.command()
def explain(workload: WorkloadSpec, plan: PlanPath, json_path: JsonPath = None) -> None:
    """Compile with a plan and tell each decision with its reason."""
    from ditopt.inspection import explain_fully
    from ditopt.plan import Plan
    from ditopt.workload import load_workload

    loaded, chosen = load_workload(workload), Plan.load(plan)
    with terminal_progress() as progress:
        progress("compiling the model", 0, 1)
        found = explain_fully(loaded, chosen)
    _show(found.table(), found.to_json(), json_path)


@app.command()
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
    json_path: JsonPath = None,
) -> None:
    """Write the model, with its plan, as an engine: a folder that another process runs."""
    from ditopt.export.report import export_table
    from ditopt.export.run import export as write
    from ditopt.workload import load_workload

    loaded, options = load_workload(workload), {} if opset is None else {"opset": opset}
    with terminal_progress() as progress:
        report = write(
            loaded, out, plan, format=format, model=model, options=options, progress=progress
        )
    _show(export_table(report), report.to_json(), json_path)


@app.command()
def run(
    workload: WorkloadSpec,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="png or gif to write.", callback=_can_be_written
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
        progress("sampling", 0, 1)
        result = sample_to_file(loaded, engine, out, seed=seed, expect_sha256=expect_sha256)
    _show(f"Seed {seed} in {result['ms']:.0f} ms, written to {out}.", result, json_path)


@app.command()
def bench(
    workload: WorkloadSpec,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Adds the variant ditopt+plan.")
    ] = None,
    engine: EnginePath = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", metavar="N", help="Rounds; by default the plan's audit seeds."),
    ] = None,
    expect_sha256: Sha256 = None,
    json_path: JsonPath = None,
) -> None:
    """Measure eager, torch.compile, ditopt, ditopt with the plan and an engine side by side."""
    from ditopt.bench import FIRST_SEED
    from ditopt.bench import bench as measure
    from ditopt.export.sample import bench_variants
    from ditopt.tables import bench_table
    from ditopt.workload import load_workload

    chosen = None if seeds is None else range(FIRST_SEED, FIRST_SEED + seeds)
    loaded = load_workload(workload)
    variants = None if engine is None else bench_variants(loaded, plan, engine, expect_sha256)
    with terminal_progress() as progress:
        result = measure(loaded, plan, seeds=chosen, variants=variants, progress=progress)
    _show(bench_table(result), result.to_json(), json_path)
    result.check()


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for everything written.")
    ] = Path("ditopt-demo"),
    min_psnr: Annotated[
        float, typer.Option("--min-psnr", metavar="DB", help="Quality to keep, mean PSNR in dB.")
    ] = 30.0,
    json_path: JsonPath = None,
) -> None:
    """Profile, plan and bench the embedded video model; draw dense beside optimized frames."""
    from ditopt.demo import run_demo
    from ditopt.tables import bench_table

    with terminal_progress() as progress:
        result, picture = run_demo(out, min_psnr, progress)
    _show(bench_table(result), result.to_json(), json_path)
    result.check()
    typer.echo(f"Plan: {out / 'plan.yaml'}   Picture: {picture}", err=json_path == "-")


def _show(table: RenderableType, value: Any, json_path: str | None) -> None:
    """Print the table, and write the JSON where it was asked for."""
    if json_path == "-":
        typer.echo(json.dumps(value, indent=2, allow_nan=False))
        return
    console = Console()
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)
    if json_path is not None:
        write_json(json_path, value)


def _find_cause(error: BaseException | None) -> DitoptError | None:
    """The DitoptError inside `error`: Dynamo wraps what a backend raises in an error of its own."""
    while error is not None and not isinstance(error, DitoptError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Warnings of ditopt on one line without a source position; others as Python prints them."""
    if issubclass(category, DitoptWarning):
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def main() -> None:
    """Entry point of the `ditopt` command."""
    warnings.formatwarning = _format_warning
    try:
        app()
    except Exception as error:
        cause = _find_cause(error)
        if cause is None:
            raise
        typer.echo(f"ditopt: {cause}", err=True)
        sys.exit(2)
