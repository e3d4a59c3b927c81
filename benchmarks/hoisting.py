"""What a step saves when the parts that do not depend on the latents are not computed again.

    python benchmarks/hoisting.py --output benchmarks/results/hoisting_h200.json
    python benchmarks/hoisting.py --tiny --rounds 3       # on a CPU, in a minute or two
    python benchmarks/hoisting.py --host --rounds 60 --output benchmarks/results/hoisting_cpu.json

One compiled model with hoisting and one without run in turn, in every round in a shuffled order:

- off: without hoisting;
- new timestep: the prompt is the last call's, the timestep a new tensor (a step of a run);
- all known: the timestep is the last call's too (the second branch of guidance, a repeated run);
- all new: nothing comes back, so hoisting can only cost.

Medians and interquartile ranges of single calls, device work included, and the median of each
round's difference to "off". Speeds are written only where all of them give the same numbers: the
three with hoisting to the bit, with and without hoisting within bf16 rounding.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from models import kernels_of, relative_l2
from shapes import SHAPES, build
from torch import Tensor

import ditopt
from ditopt.environment import describe_environment
from ditopt.timing import Spread, synchronize, timed
from ditopt.torch_backend import compiled_graphs

LIMIT = 2e-2
"""Relative L2 between bf16 programs whose fusions differ; torch.compile against eager has 1e-2."""


def fresh(inputs: Mapping[str, Any], names: Callable[[str], bool]) -> dict[str, Any]:
    """The same call with new tensors of the same values in some places."""
    return {
        name: value.clone() if isinstance(value, Tensor) and names(name) else value
        for name, value in inputs.items()
    }


def measure(
    name: str, device: torch.device, rounds: int, *, tiny: bool, cold: bool, beside: bool
) -> dict[str, Any]:
    """One model; `cold` empties the compiler's caches before each first call.

    `beside` compiles it without hoisting as well; else "all new" stands for that.
    """
    from torch._inductor.utils import fresh_cache

    model, inputs = build(name, device, tiny=tiny)
    runs: dict[str, Callable[..., Any]] = {}
    first: dict[str, float] = {}
    results: dict[str, Tensor] = {}
    for label, hoist in ((("off", False),) if beside else ()) + (("on", True),):
        torch.compiler.reset()
        run = torch.compile(model, backend="ditopt", options={"hoist": hoist})
        with fresh_cache() if cold else nullcontext():
            out, first_ms = timed(lambda run=run: run(**inputs)[0])
        runs[label], first[label], results[label] = run, first_ms / 1e3, out.clone()
        print(f"  {label}: first call {first[label]:.1f} s", flush=True)
    on = runs["on"]
    base = "off" if beside else "all new"
    cases: dict[str, Callable[[], Any]] = {
        "new timestep": lambda: on(**fresh(inputs, lambda n: n == "timestep"))[0],
        "all known": lambda: on(**inputs)[0],
        "all new": lambda: on(**fresh(inputs, lambda n: True))[0],
    }
    if beside:
        cases["off"] = lambda: runs["off"](**inputs)[0]
    same = all(torch.equal(results["on"], cases[label]()) for label in cases if label != "off")
    error = relative_l2(results["on"], results["off"]) if beside else None
    record = compiled_graphs(model)[-1]
    row: dict[str, Any] = {
        "model": name,
        "title": SHAPES[name].title,
        "first_call_s": first if cold else None,
        "programs": {
            label: one.programs for label, one in zip(runs, compiled_graphs(model), strict=True)
        },
        "hoisted": [d.reason for d in record.decisions if d.rule == "hoist"],
        "gate": {"bit_equal": same, "error_to_off": error, "limit": LIMIT},
        "request": count_request(model, on, inputs),
    }
    if not (same and (error is None or error <= LIMIT)):
        print(f"  gate: {row['gate']}: no speeds", flush=True)
        return row
    samples: dict[str, list[float]] = {label: [] for label in cases}
    order, shuffler = list(cases), random.Random(0)
    for case in (*cases.values(), *cases.values()):
        case()
    for _ in range(rounds):
        shuffler.shuffle(order)
        for label in order:
            samples[label].append(timed(cases[label])[1])
    row |= {"rounds": rounds, "saved_against": base}
    row["cases"] = {}
    for label, times in samples.items():
        spread = Spread.of(times)
        saved = [a - b for a, b in zip(samples[base], times, strict=True)]
        row["cases"][label] = {
            "ms": spread.median_ms,
            "ms_iqr": spread.iqr_ms,
            "saved_ms": statistics.median(saved),
            "saved_ms_iqr": Spread.of(saved).iqr_ms,
        }
        if device.type == "cuda":
            profile = kernels_of(cases[label])
            row["cases"][label] |= {"kernels": profile["count"], "kernels_ms": profile["ms"]}
    return row


def host_time(name: str, rounds: int) -> dict[str, Any]:
    """Microseconds of the calling thread per call of the tiny model on the CPU.

    The thread's own time, with one compute thread, does not see what else the machine does. What
    hoisting saves is work and launches; what it costs is looking at the inputs, and a program more
    for each group where these are new.
    """
    torch.set_num_threads(1)
    model, inputs = build(name, torch.device("cpu"), tiny=True)
    runs: dict[str, Callable[..., Any]] = {}
    for label, options in (("inductor", None), ("off", {"hoist": False}), ("on", {})):
        torch.compiler.reset()
        backend = {} if options is None else {"backend": "ditopt", "options": options}
        runs[label] = torch.compile(model, **backend)
        runs[label](**inputs)
    cases: dict[str, tuple[str, Callable[[str], bool]]] = {
        "inductor": ("inductor", lambda n: True),
        "off": ("off", lambda n: True),
        "new timestep": ("on", lambda n: n in ("timestep", "hidden_states")),
        "all known": ("on", lambda n: n == "hidden_states"),
        "all new": ("on", lambda n: True),
    }
    samples: dict[str, list[float]] = {label: [] for label in cases}
    number = 0
    for _ in range(rounds):
        for label, (variant, new) in cases.items():
            best = []
            for _ in range(10):
                number += 1
                arguments = fresh(inputs, new)
                if new("timestep"):
                    arguments["timestep"] = arguments["timestep"] * 0 + number
                started = time.thread_time()
                runs[variant](**arguments)
                best.append(1e6 * (time.thread_time() - started))
            samples[label].append(min(best))
    return {
        "model": f"{name}, tiny",
        "rounds": rounds,
        "us": {label: statistics.median(times) for label, times in samples.items()},
        "us_iqr": {label: Spread.of(times).iqr_ms for label, times in samples.items()},
    }


def count_request(model: Any, on: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, int]:
    """How often the groups ran in a request of eight steps with a new prompt."""
    prompt = fresh(inputs, lambda n: True)
    before = ditopt.stats(model)["kernels"]
    for _ in range(8):
        on(**fresh(prompt, lambda n: n in ("timestep", "hidden_states")))
    after = ditopt.stats(model)["kernels"]
    names = ("hoisted.computed", "hoisted.reused")
    return {"steps": 8} | {n: after.get(n, 0) - before.get(n, 0) for n in names}


def table(results: Mapping[str, Any]) -> str:
    lines = ["| model | case | ms | IQR | saved ms | IQR | kernels | kernels ms |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model in results["models"]:
        for label, one in model.get("cases", {}).items():
            kernels = f"{one['kernels']} | {one['kernels_ms']:.3f}" if "kernels" in one else " | "
            lines.append(
                f"| {model['model']} | {label} | {one['ms']:.3f} | {one['ms_iqr']:.3f} "
                f"| {one['saved_ms']:+.3f} | {one['saved_ms_iqr']:.3f} | {kernels} |"
            )
        lines.append(f"{model['model']}: {model['first_call_s']} {model['programs']}")
        lines.append(f"    {model['gate']} {model['request']}")
        lines += [f"    {reason}" for reason in model["hoisted"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["pixart", "flux", "wan"])
    parser.add_argument("--cold", nargs="*", default=["wan"], help="time first calls of these")
    parser.add_argument("--host", action="store_true", help="only host_time, on the CPU")
    parser.add_argument("--alone", action="store_true", help='save the compilation of "off"')
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, for a dry run")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    torch._dynamo.config.recompile_limit = 64
    on_cuda = torch.cuda.is_available() and not arguments.host
    device = torch.device("cuda" if on_cuda else "cpu")
    results: dict[str, Any] = {"environment": describe_environment(device), "models": []}
    with torch.no_grad():
        torch.compile(lambda x: x.sin().sum())(torch.ones(4096, device=device))
        for name in arguments.models:
            print(name, flush=True)
            if arguments.host:
                results.setdefault("host", []).append(host_time(name, arguments.rounds))
                print(results["host"][-1], flush=True)
                continue
            cold = name in arguments.cold
            row = measure(
                name,
                device,
                arguments.rounds,
                tiny=arguments.tiny,
                cold=cold,
                beside=not arguments.alone,
            )
            results["models"].append(row)
            synchronize()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            save(arguments.output, results)
    save(arguments.output, results)
    print(table(results))


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
