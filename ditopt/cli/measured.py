"""`bench` and `demo`: variants measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditopt.cli.common import EnginePath, JsonPath, Sha256, WorkloadSpec, show
from ditopt.progress import terminal_progress


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
    from ditopt.tables import bench_table
    from ditopt.workload import load_workload

    chosen = None if seeds is None else range(FIRST_SEED, FIRST_SEED + seeds)
    loaded = load_workload(workload)
    variants, engine_plan = None, None
    if engine is not None:
        from ditopt.export.sample import bench_variants

        variants, engine_plan = bench_variants(loaded, plan, engine, expect_sha256)
    with terminal_progress() as progress:
        result = measure(
            loaded,
            plan,
            seeds=chosen,
            variants=variants,
            engine_plan=engine_plan,
            progress=progress,
        )
    show(bench_table(result), result.to_json(), json_path)
    result.check()


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
        found = run_demo(out, min_psnr, progress)
    show(bench_table(found.bench), found.bench.to_json(), json_path)
    found.bench.check()
    where = f"Plan: {found.plan}   Picture: {found.picture}   Report: {found.report}"
    typer.echo(where, err=json_path == "-")
