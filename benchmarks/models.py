"""One denoiser step of published-shape models: eager, torch.compile and ditopt in one run.

    python benchmarks/models.py --output benchmarks/results/models_h200.json
    python benchmarks/models.py --tiny --rounds 5       # on a CPU, in a minute or two

Each variant's first call is timed with empty compiler caches. Then all variants run in turn, in
every round in a shuffled order (a GPU that just idled clocks higher, so nobody may always follow
the same neighbour): medians and interquartile ranges of single calls, device work included, and the
median of the per-round ratios to torch.compile. Speeds are printed and written
only where the correctness gate of the same run holds: the output's distance (relative L2) to a
float32 oracle of the same weights is at most twice torch.compile's own. Results are written after
each model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, build, upcast
from torch import Tensor, nn

from ditopt.environment import describe_environment
from ditopt.timing import PeakMemory, Spread, synchronize, timed

Call = Callable[[], Tensor]
Variant = Callable[[nn.Module], Callable[..., Any]]

EMBEDDED = "tiny_video"

BUDGET = 2.0
"""An exact rewrite may be this many times as far from the oracle as torch.compile."""


def whole_graph(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """The ditopt backend without the cut into blocks, to see what the cut costs."""
    from functools import partial
    from unittest import mock

    from ditopt.capture import capture
    from ditopt.config import Options
    from ditopt.torch_backend import compile_graph

    with mock.patch("ditopt.capture.capture", partial(capture, whole=True)):
        return compile_graph(gm, inputs, Options(), "inductor")


def single_blocks(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """The ditopt backend with one program for each block, to see what joining them gains."""
    from unittest import mock

    from ditopt.config import Options
    from ditopt.torch_backend import compile_graph

    with mock.patch(
        "ditopt.program.spans", lambda keys, most: [range(k, k + 1) for k in range(len(keys))]
    ):
        return compile_graph(gm, inputs, Options(), "inductor")


def compiled(**arguments: Any) -> Variant:
    """A variant that `torch.compile` makes."""
    return lambda model: torch.compile(model, **arguments)


VARIANTS: dict[str, Variant] = {
    "eager": lambda model: model,
    "inductor": compiled(),
    "ditopt": compiled(backend="ditopt"),
    "ditopt, no fused projections": compiled(backend="ditopt", options={"fuse_projections": False}),
    "ditopt, single blocks": compiled(backend=single_blocks),
    "ditopt, whole graph": compiled(backend=whole_graph),
}
USUAL = ("eager", "inductor", "ditopt")


def relative_l2(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def float32_result(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The oracle: the same weights and inputs in float32 (`main` switches TF32 off)."""
    exact = copy.deepcopy(model).float()
    result: Tensor = exact(**upcast(dict(inputs)))[0]
    return result


def kernels_of(call: Call) -> dict[str, Any]:
    """Number and total milliseconds of one call's GPU kernels, and the longest ones by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.device_time_total / 1e3)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "count": len(events),
        "ms": sum(sum(times) for times in by_name.values()),
        "longest": [[name[:110], len(times), round(sum(times), 4)] for name, times in longest],
    }


def measure(
    name: str, device: torch.device, variants: Mapping[str, Variant], rounds: int, tiny: bool
) -> dict[str, Any]:
    """One model: first calls, gate, interleaved rounds."""
    from torch._inductor.utils import fresh_cache

    shape = SHAPES[name]
    model, inputs = build(name, device, tiny=tiny)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    memory = PeakMemory(device)
    truth = float32_result(model, inputs).cpu()
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for label, variant in variants.items():
        run = variant(model)
        calls[label] = lambda run=run: run(**inputs)[0]
        with fresh_cache():
            out, first_ms = timed(calls[label])
        rows[label] = {
            "variant": label,
            "first_call_s": first_ms / 1e3,
            "error_float32": relative_l2(out.cpu(), truth),
        }
        if label == "eager":
            eager = out
        rows[label]["error_eager"] = relative_l2(out, eager)
        memory.start()
        calls[label]()
        synchronize()
        rows[label]["peak_bytes"] = memory.peak_bytes()
        print(f"  {label}: {json.dumps(rows[label])}", flush=True)
    for label, facts in _ditopt_facts(model, variants).items():
        rows[label].update(facts)
    limit = BUDGET * rows["inductor"]["error_float32"]
    red = [label for label, row in rows.items() if not row["error_float32"] <= limit]
    red = [label for label in red if label.startswith("ditopt")]
    result = {
        "model": name,
        "title": shape.title,
        "class": shape.cls,
        "config": shape.config | (shape.tiny if tiny else {}),
        "inputs": {k: list(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)},
        "dtype": "bfloat16",
        "gate": {"limit": limit, "failed": red},
        "variants": list(rows.values()),
    }
    if red:
        print(f"  gate: {red} over {limit:.3g}: no speeds", flush=True)
        return result
    samples = interleave(calls, rounds)
    for label, times in samples.items():
        spread = Spread.of(times)
        ratios = [a / b for a, b in zip(times, samples["inductor"], strict=True)]
        rows[label] |= {
            "ms": spread.median_ms,
            "ms_iqr": spread.iqr_ms,
            "ratio_to_inductor": statistics.median(ratios),
        }
    result["rounds"] = rounds
    if device.type == "cuda":
        result["profiles"] = {label: kernels_of(call) for label, call in calls.items()}
        for label, profile in result["profiles"].items():
            rows[label] |= {"kernels": profile["count"], "kernels_ms": profile["ms"]}
    return result


def interleave(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant by round, in an order that is shuffled for each."""
    samples: dict[str, list[float]] = {label: [] for label in calls}
    order, shuffler = list(calls), random.Random(0)
    for call in (*calls.values(), *calls.values()):
        call()
    for _ in range(rounds):
        shuffler.shuffle(order)
        for label in order:
            samples[label].append(timed(calls[label])[1])
    return samples


def _ditopt_facts(model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Pieces, distinct programs and seconds of each ditopt variant, in the order of compilation."""
    from ditopt.torch_backend import compiled_graphs

    labels = [label for label in variants if label.startswith("ditopt")]
    records = compiled_graphs(model)
    if len(records) != len(labels):
        return {}
    return {
        label: {
            "pieces": len(record.pieces),
            "programs": record.programs,
            "backend_s": record.seconds,
        }
        for label, record in zip(labels, records, strict=True)
    }


def embedded(device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The demo's model, six blocks, and one call with guidance as a batch of two."""
    from ditopt.demo import demo_workload
    from ditopt.workload import load_workload

    (model,) = load_workload(demo_workload()).models.values()
    draw = {"device": device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 64, 64, **draw),
        "timestep": torch.full((2,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(2, 8, 256, **draw),
    }
    return model, inputs


def host_overhead(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Host microseconds that ditopt adds to a call of the tiny model, over torch.compile.

    Each sample is a run of calls without waiting for the device in between: with kernels this short
    the host is what takes the time.
    """
    model, inputs = embedded(device) if name == EMBEDDED else build(name, device, tiny=True)
    torch.compiler.reset()
    runs = {label: VARIANTS[label](model) for label in ("inductor", "ditopt")}
    many = 50

    def repeat(run: Callable[..., Any]) -> None:
        for _ in range(many):
            run(**inputs)

    calls = {label: (lambda run=run: repeat(run)) for label, run in runs.items()}
    samples = interleave(calls, rounds)  # type: ignore[arg-type]
    added = [
        1e3 * (ours - theirs) / many
        for ours, theirs in zip(samples["ditopt"], samples["inductor"], strict=True)
    ]
    return {
        "model": name if name == EMBEDDED else f"{name}, tiny",
        "device": device.type,
        "us": {label: 1e3 * statistics.median(times) / many for label, times in samples.items()},
        "added_us": statistics.median(added),
        "added_us_iqr": Spread.of(added).iqr_ms,
        "rounds": rounds,
        "calls_per_round": many,
    }


def table(results: Mapping[str, Any]) -> str:
    lines = ["| model | variant | ms | IQR | x inductor | first call | error | kernels |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model in results["models"]:
        for row in model["variants"]:
            timing = (
                f"{row['ms']:.3f} | {row['ms_iqr']:.3f} | {row['ratio_to_inductor']:.3f}"
                if "ms" in row
                else "withheld | | "
            )
            lines.append(
                f"| {model['model']} | {row['variant']} | {timing} | {row['first_call_s']:.1f} s "
                f"| {row['error_float32']:.2e} | {row.get('kernels', '')} |"
            )
    lines += [
        f"host overhead, {one['model']} on {one['device']}: {one['added_us']:+.1f} us a call "
        f"(IQR {one['added_us_iqr']:.1f}; inductor {one['us']['inductor']:.0f})"
        for one in results["host_overhead"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["dit-xl", "flux", "wan"])
    parser.add_argument("--overhead", nargs="*", default=["dit-xl", "flux", "wan", EMBEDDED])
    parser.add_argument(
        "--variants", nargs="*", default=[], help="further variants, as MODEL:VARIANT"
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, for a dry run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profiles", type=Path, help="where to list each variant's GPU kernels")
    arguments = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = describe_environment(device)
    for module in ("diffusers", "triton"):
        try:
            versions[module] = __import__(module).__version__
        except ImportError:
            versions[module] = None
    results: dict[str, Any] = {"environment": versions, "models": [], "host_overhead": []}

    profiles: dict[str, Any] = {}

    def save() -> None:
        for path, values in ((arguments.output, results), (arguments.profiles, profiles)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(values, indent=1) + "\n")

    with torch.no_grad():
        # The compiler's own start (workers, headers) is nobody's cold start.
        torch.compile(lambda x: x.sin().sum())(torch.ones(4096, device=device))
        for name in arguments.overhead:
            results["host_overhead"].append(host_overhead(name, device, arguments.rounds))
            print(results["host_overhead"][-1], flush=True)
            save()
        for name in arguments.models:
            started = time.perf_counter()
            further = [one.partition(":")[2] for one in arguments.variants if one.startswith(name)]
            variants = {label: VARIANTS[label] for label in (*USUAL, *further)}
            print(name, flush=True)
            result = measure(name, device, variants, arguments.rounds, arguments.tiny)
            profiles[name] = result.pop("profiles", {})
            results["models"].append(result)
            print(f"  {time.perf_counter() - started:.0f} s\n{table(results)}", flush=True)
            save()
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
