"""`plan` and `explain`: the search for a plan, and what a plan does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli.common import JsonPath, PlanPath, ProfileDir, WorkloadSpec, can_be_written, show
from ditopt.progress import terminal_progress


def plan(
    profile_dir: ProfileDir,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Plan file to write.", callback=can_be_written
        ),
    ],
    min_psnr: Annotated[
        float | None,
        typer.Option("--min-psnr", metavar="DB", help="Quality to keep, mean PSNR in dB."),
    ] = None,
    min_ssim: Annotated[
        float | None, typer.Option("--min-ssim", metavar="S", help="Quality to keep, mean SSIM.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option("--target-speedup", metavar="X", help="Dense time over plan's.")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", metavar="AMOUNT", help="Weights and stored residuals, as in 512MiB."
        ),
    ] = None,
    max_programs: Annotated[
        int, typer.Option("--max-programs", metavar="N", min=1, help="Different block programs.")
    ] = 4,
    audit_seeds: Annotated[
        int, typer.Option("--audit-seeds", metavar="N", min=1, help="Fresh seeds of an audit.")
    ] = 3,
    techniques: Annotated[
        str,
        typer.Option("--techniques", metavar="LIST", help="The others leave the model as it is."),
    ] = "attention,cache,linears",
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Show the fastest plan for each quality.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Search the fastest plan that keeps a quality (30 dB unless told), or the best of the rest."""
    from ditopt.cli.sizes import parse_bytes
    from ditopt.plan import Goal
    from ditopt.search import LoopSpec, SearchOptions, find_plan
    from ditopt.search.pareto import pareto_table

    if min_psnr is None and min_ssim is None and target_speedup is None and max_memory is None:
        min_psnr = 30.0
    goal = Goal(
        min_psnr_db=min_psnr,
        min_ssim=min_ssim,
        target_speedup=target_speedup,
        max_memory_bytes=None if max_memory is None else parse_bytes(max_memory),
    )
    options = SearchOptions.parse(
        techniques, max_programs=max_programs, loop=LoopSpec(audit_seeds=audit_seeds)
    )
    with terminal_progress() as progress:
        found = find_plan(profile_dir, goal, out, progress, options=options)
    value = found.plan.model_dump(mode="json")
    if not pareto:
        show(f"Plan written to {out}.", value, json_path)
        return
    table = pareto_table(found.record)
    show(table, {"plan": value, "search": found.record.model_dump(mode="json")}, json_path)


def explain(workload: WorkloadSpec, plan: PlanPath, json_path: JsonPath = None) -> None:
    """Compile with a plan and tell each decision with its reason."""
    from ditopt.inspection import explain_fully
    from ditopt.plan import Plan
    from ditopt.workload import load_workload

    loaded, chosen = load_workload(workload), Plan.load(plan)
    with terminal_progress() as progress:
        progress("compiling the model", 0, 1)
        found = explain_fully(loaded, chosen)
    show(found.table(), found.to_json(), json_path)
