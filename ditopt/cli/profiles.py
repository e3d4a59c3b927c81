"""`inspect`, `profile` and `merge`: what is in a model, what it does along the denoising loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli.common import JsonPath, WorkloadSpec, show
from ditopt.cli.sizes import parse_bytes
from ditopt.errors import ConfigError
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
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget", metavar="SIZE", help="Beyond the model's own: 512MiB, 2GiB (1GiB)."
        ),
    ] = None,
    first_seed: Annotated[
        int, typer.Option("--first-seed", metavar="N", min=0, help="Seeds count from here.")
    ] = 0,
    for_device: Annotated[
        str | None,
        typer.Option(
            "--for-device", metavar="NAME", help="Costs by the peak rates of another device."
        ),
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Time attention anew, even if it was timed.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Run the denoising loop and measure every site; an interrupted profile resumes."""
    from ditopt.profiling import ProfileSpec
    from ditopt.profiling import profile as measure
    from ditopt.workload import load_workload

    if linears and for_device is not None:
        raise ConfigError(
            "--linears times layers on this machine, --for-device wants no measurement",
            remedy="Leave one of the two out.",
        )
    memory = {} if memory_budget is None else {"memory_bytes": parse_bytes(memory_budget, 1 << 20)}
    spec = ProfileSpec(
        first_seed=first_seed, for_device=for_device, measure_again=measure_again, **memory
    )
    loaded = load_workload(workload)
    try:
        with terminal_progress() as progress:
            result = measure(loaded, out, seeds, progress, spec, source=loaded.origin)
            if linears:
                from ditopt.profiling.cost_cache import kept_linear_costs
                from ditopt.profiling.linears import profile_linears

                kept = kept_linear_costs(result.hardware, again=measure_again)
                profile_linears(loaded, out, progress, measure=kept)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes the profile", err=True)
        raise
    show(f"Profile written to {out}.", result.model_dump(mode="json"), json_path)


def merge(
    profiles: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Finished profiles of one workload."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")],
    costs_of: Annotated[
        Path | None,
        typer.Option(
            "--costs-of", metavar="DIR", help="Whose times to keep; the first by default."
        ),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Merge profiles of several seeds and machines into one."""
    from ditopt.profiling import merge_profiles

    result = merge_profiles(profiles, out, costs_of)
    seeds = ", ".join(map(str, result.seeds))
    show(f"Profile of seeds {seeds} written to {out}.", result.model_dump(mode="json"), json_path)
