"""Times of calls as profiles measure them, and the loops they predict, against loops' own times.

    python benchmarks/call_times.py PROFILE PLAN... --workload examples/wan_video/workload.py \
        --output benchmarks/results/call_times_h200.json

Calls are timed by events in the stream, as profiles do, and with a wait before and after each, as
they did before. A plan that caches and leaves attention dense is predicted to take full calls x
their time + skipped calls x theirs; what the sampler does between calls is in the loop's time only.
Loops are timed as a user's are, compiled, from start to end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ditopt.environment import describe_environment
from ditopt.plan import Plan
from ditopt.profiling import cost
from ditopt.profiling.loops import only_model
from ditopt.profiling.schema import Profile
from ditopt.timing import timed, timed_in_loop
from ditopt.workload import Workload, load_workload

SEED = 2000


def waiting(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], float]]:
    """`timed_in_loop` as it was: the device is waited for around every call."""
    result, elapsed_ms = timed(run)
    return result, lambda: elapsed_ms


def calls_of(workload: Workload, profile: Profile, clock: Callable[..., Any]) -> dict[str, float]:
    """Times of dense and of skipped calls, of a plan that skips every second one."""
    cost.timed_in_loop = clock
    try:
        loop = cost.timed_loops(workload, cost.every_second_call(profile), [0, 1])[0]
    finally:
        cost.timed_in_loop = timed_in_loop
    return {"full_ms": loop.full_ms, "skip_ms": loop.skip_ms}


def loop_seconds(workload: Workload, plan: Plan, rounds: int) -> float:
    """Median time of whole loops."""
    torch.compiler.reset()
    options: dict[str, Any] = {"plan": plan}
    compiled = torch.compile(only_model(workload), backend="ditopt", options=options)
    models = dict.fromkeys(workload.models, compiled)
    times_ms = [timed(lambda: workload.run(SEED, models))[1] for _ in range(rounds + 2)]
    return statistics.median(times_ms[2:]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("plans", type=Path, nargs="+", help="that cache and do nothing else")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    workload, profile = load_workload(options.workload), Profile.load(options.profile)
    clocks = {"events": timed_in_loop, "waiting": waiting}
    calls = {name: calls_of(workload, profile, clock) for name, clock in clocks.items()}
    loops: list[dict[str, Any]] = []
    for path in options.plans:
        plan = Plan.load(path)
        if plan.cache is None or any(phase.attention or phase.linear for phase in plan.phases):
            parser.error(f"{path}: a plan that caches and does nothing else is needed")
        full = len(plan.cache.full)
        skipped = plan.sampler.calls - full
        row: dict[str, Any] = {"plan": path.stem, "full": full, "skipped": skipped}
        row["loop_s"] = loop_seconds(workload, plan, options.rounds)
        for name, ms in calls.items():
            row[f"{name}_s"] = (full * ms["full_ms"] + skipped * ms["skip_ms"]) / 1e3
        loops.append(row)
        print(row, flush=True)
    device = next(only_model(workload).parameters()).device
    report = {"environment": describe_environment(device), "calls": calls, "loops": loops}
    print(json.dumps(calls))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
