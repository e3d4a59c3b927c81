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
    show(f"Plan written to {out}.", found.model_dump(mode="json"), json_path)


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
