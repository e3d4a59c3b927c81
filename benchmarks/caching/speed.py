"""Speed of cached loops at published shapes, against the bound T / (K + (T - K) s).

    python benchmarks/caching/speed.py --models dit-xl flux wan --output speed.json

Weights are random: only times and bytes are read off. s is the share of a full call that a skipped
one takes. Loops with and without skips and torch.compile's run side by side, in shuffled rounds;
nothing is timed before a skipped call has reproduced a full call of the same inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loops import (
    CALLS,
    PUBLISHED,
    Loop,
    bound,
    calls_for_speedup,
    compiled,
    relative_l2,
    spread_pairs,
    unchecked,
)  # fmt: skip
from shapes import SHAPES, build
from steps import gate, memory, output_shapes, skip_kernels, step_times
from tables import speed_table

from ditopt.environment import describe_environment
from ditopt.kernels.forecast import reference
from ditopt.timing import Spread, timed

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule

Options = Callable[[], dict[str, Any]]
BF16_DISTANCE = 0.04  # twice what torch.compile has been from eager on these shapes


def operators() -> dict[str, Any]:
    """The forecast by PyTorch's own operators."""
    return {"forecast": reference.forecast}


def speed(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shape."""
    calls = arguments.calls or CALLS[name]
    model, inputs = build(name, device, tiny=arguments.tiny)
    loop = Loop(inputs, calls)
    result: dict[str, Any] = {"model": name, "title": SHAPES[name].title, "calls": calls}
    eager, limit = model(**inputs)[0], BF16_DISTANCE
    inductor: Callable[..., Any] | None = None
    if name in arguments.inductor:
        inductor = torch.compile(model)
        out, first_ms = timed(lambda: inductor(**inputs)[0])
        limit = 2 * relative_l2(out, eager)
        result |= {"inductor_first_call_s": first_ms / 1e3, "inductor_to_eager": limit / 2}
    program = compiled(model, loop.sampler, arguments.backend)
    result["first_call_s"] = timed(lambda: program.model(**inputs))[1] / 1e3
    print(f"{name}: compiled, {result}", flush=True)
    result["gate"] = gate(program, loop, eager, limit)
    if not result["gate"]["ok"]:
        return result
    outputs = output_shapes(program, loop)
    result["steps"] = step_times(program, loop)
    share = result["steps"]["share"]
    print(f"  steps: {result['steps']}", flush=True)
    wanted = [round(calls * s) for s in (1 / 2, 1 / 3, 1 / 4)]
    schedules = {k: spread_pairs(calls, k) for k in wanted}
    if device.type == "cuda":
        if name in arguments.operators:
            result["steps_operators"] = step_times(program, loop, operators)
        result["skip_kernels"] = skip_kernels(program, loop)
        result["memory"] = [memory(program, loop, schedules[k], outputs) for k in wanted[::2]]
    result["published"] = {
        "speedup": PUBLISHED[name],
        "full_calls": {
            str(t): calls_for_speedup(PUBLISHED[name], t, share) for t in (20, 28, 50, calls)
        },
    }
    print(f"  {result['published']}", flush=True)
    return result | measured_loops(program.model, program.use, loop, schedules, inductor, arguments)


def measured_loops(
    model: Callable[..., Any],
    use: Callable[..., None],
    loop: Loop,
    schedules: Mapping[int, CacheSchedule],
    inductor: Callable[..., Any] | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Whole loops, side by side in shuffled rounds while the time allows."""
    runs: dict[str, tuple[CacheSchedule | None, bool]] = {
        "full": (None, True),
        **{f"K={k}": (schedule, True) for k, schedule in schedules.items()},
        f"K={min(schedules)}, no session": (schedules[min(schedules)], False),
    }
    samples: dict[str, list[float]] = {label: [] for label in runs}
    if inductor is not None:
        samples["torch.compile"] = []
    order, shuffler, rounds = list(samples), random.Random(0), 0
    started = time.perf_counter()
    while rounds < arguments.rounds:
        shuffler.shuffle(order)
        for label in order:
            if label == "torch.compile":
                samples[label].append(timed(lambda: loop(inductor, session=False))[1])
                continue
            schedule, session = runs[label]
            use(schedule)
            ms = timed(lambda session=session: loop(model, session=session))[1]
            samples[label].append(ms)
        rounds += 1
        spent = time.perf_counter() - started
        if rounds >= 3 and spent + spent / rounds > arguments.seconds:
            break
    return {"rounds": rounds, "samples_ms": samples}


def loop_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Medians, ratios within each round, and the share of the bound that is reached."""
    samples, calls = result["samples_ms"], result["calls"]
    rows = []
    for label, times in samples.items():
        spread = Spread.of(times)
        row: dict[str, Any] = {"loop": label, "ms": spread.median_ms, "iqr_ms": spread.iqr_ms}
        for base in ("full", "torch.compile"):
            if base in samples:
                ratios = [a / b for a, b in zip(samples[base], times, strict=True)]
                row[f"speedup_over_{base}"] = statistics.median(ratios)
        if label.startswith("K="):
            k = int(label[2:].partition(",")[0])
            row |= {"full_calls": k, "bound": bound(calls, k, result["steps"]["share"])}
            row["share_of_bound"] = row["speedup_over_full"] / row["bound"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--models", nargs="*", default=["dit-xl", "flux", "wan"])
    parser.add_argument("--inductor", nargs="*", default=["dit-xl", "flux", "wan"])
    parser.add_argument("--operators", nargs="*", default=["dit-xl", "flux"])
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, for a dry run")
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the loops of one model")
    parser.add_argument("--warm", action="store_true", help="fill compilers' caches, time nothing")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"environment": describe_environment(device), "speed": []}
    for name in arguments.models:
        with torch.no_grad(), unchecked():
            if arguments.warm:
                warm(name, device, arguments)
                continue
            result = speed(name, device, arguments)
        if "samples_ms" in result:
            result["loops"] = loop_rows(result)
            result["samples_ms"] = {
                label: [round(ms, 3) for ms in times]
                for label, times in result["samples_ms"].items()
            }
        results["speed"].append(result)
        print(speed_table([result]), flush=True)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def warm(name: str, device: torch.device, arguments: argparse.Namespace) -> None:
    """Fill the compilers' caches, in a process beside one that measures no times."""
    model, inputs = build(name, device, tiny=arguments.tiny)
    program = compiled(model, Loop(inputs, CALLS[name]).sampler, arguments.backend)
    seconds = [timed(lambda: program.model(**inputs))[1] / 1e3]
    if name in arguments.inductor:
        seconds.append(timed(lambda: torch.compile(model)(**inputs))[1] / 1e3)
    print(f"warm {name}: {', '.join(f'{s:.0f} s' for s in seconds)}", flush=True)
    assert math.isfinite(sum(seconds))


if __name__ == "__main__":
    main()
