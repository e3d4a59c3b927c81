"""Linear layers in 8 bits: matrix products, producers, whole steps, quality; one run.

    python benchmarks/quantization.py --output benchmarks/results/quantization_h200.json
    python benchmarks/quantization.py --tiny            # on a CPU, in some minutes, simulated

Every model gets a process of its own. All compile side by side (cold starts are compared among
variants of the same process only), then the matrix products and the producers are timed, and then
the models one after another, all of it without company on the GPU. The bound beside each step is
what torch.compile's step would take if every quantized layer took its time in the table of matrix
products, quantization not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import torch
import torch.nn.functional as F
from models import interleave, kernels_of, relative_l2
from shapes import SHAPES, build

from ditopt.environment import describe_environment
from ditopt.kernels.quantize_rows import ops  # noqa: F401  (registers the operator)
from ditopt.quantization import LinearRule, rowwise
from ditopt.quantization.layer import compute, derive
from ditopt.quantization.plans import candidates, uniform_plan
from ditopt.timing import Spread, synchronize, timed
from ditopt.torch_backend import compiled_graphs

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
MIN_ROWS = 256
LONG = ("flux",)
"""Models whose bf16 variant of ditopt is left to benchmarks/models.py."""

ANCHORS = (
    (32768, 1536, 1536),
    (32768, 1536, 8960),
    (32768, 8960, 1536),
    (4608, 3072, 12288),
    (118784, 3072, 12288),
)
MERGED = ((8192, 1152, 3456), (4608, 3072, 21504), (32760, 1536, 4608))
PRODUCERS = (
    (8192, 1152, "norm"),
    (32760, 1536, "norm"),
    (4608, 3072, "norm"),
    (8192, 4608, "gelu"),
    (32760, 8960, "gelu"),
    (4608, 12288, "gelu"),
    (4608, 15360, "none"),
)


def rule(**fields: Any) -> LinearRule:
    return LinearRule.model_validate({"simulate": not CUDA, **fields})


def milliseconds(run: Any) -> float:
    """Median device time of one call."""
    if not CUDA:
        return statistics.median(timed(run)[1] for _ in range(3))
    from triton.testing import do_bench

    return float(do_bench(run, warmup=15, rep=60, return_mode="median"))


def gemm(m: int, k: int, n: int, *, whole: bool, int8: bool) -> dict[str, Any]:
    """One product in bf16, in fp8 alone, and from bf16 input to bf16 output."""
    x, w, b = (torch.randn(*s, device=DEVICE, dtype=BF16) for s in ((m, k), (n, k), (n,)))
    w *= k**-0.5
    row: dict[str, Any] = {
        "m": m,
        "k": k,
        "n": n,
        "bf16_ms": milliseconds(lambda: F.linear(x, w, b)),
    }
    fp8 = rule(format="fp8_row")
    made = derive(fp8, [w], [], {})
    sizes = {"n": n, "k": k, "dtype": BF16}
    if whole:
        torch._dynamo.reset()
        run = torch.compile(lambda x: compute(fp8, x, made, b, **sizes, native=CUDA), dynamic=False)
        y = run(x)
        row["fp8_with_quantization_ms"] = milliseconds(lambda: run(x))
        row["speedup_with_quantization"] = row["bf16_ms"] / row["fp8_with_quantization_ms"]
        some = x[:256].double()
        row["fp8_error"] = relative_l2(y[:256].double(), some @ w.double().T + b.double())
    if CUDA:
        q, s = rowwise.quantize_rows(x, 448.0, FP8)
        for name, fast in (("fp8_ms", True), ("fp8_exact_accumulation_ms", False)):
            arguments = (q, made["weight"].t(), s, made["scale"], b, None, BF16, fast)
            row[name] = milliseconds(lambda a=arguments: torch._scaled_mm(*a))
        exact, fast = (
            torch._scaled_mm(q[:256], made["weight"].t(), s[:256], made["scale"], b, None, BF16, f)
            for f in (False, True)
        )
        row["fast_accumulation_error"] = relative_l2(fast, exact)
    if int8:
        eight = rule(format="int8_row")
        kept = derive(eight, [w], [], {})
        numbers, _ = rowwise.quantize_rows(x, 127.0, torch.int8)
        row["int8_ms"] = milliseconds(lambda: torch._int_mm(numbers, kept["weight"].t()))
        all_of_it = torch.compile(
            lambda x: compute(eight, x, kept, b, **sizes, native=True), dynamic=False
        )
        all_of_it(x)
        row["int8_with_quantization_ms"] = milliseconds(lambda: all_of_it(x))
    return row


def producer(m: int, k: int, kind: str) -> dict[str, Any]:
    """What comes before a layer, with and without rounding in the same kernel."""
    x = torch.randn(1, m, k, device=DEVICE, dtype=BF16)
    scale, shift = (torch.randn(1, 1, k, device=DEVICE, dtype=BF16) for _ in range(2))
    before = {
        "norm": lambda x: F.layer_norm(x, (k,)) * (1 + scale) + shift,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "none": lambda x: x * 1.0,
    }[kind]
    torch._dynamo.reset()
    alone = torch.compile(before, dynamic=False)
    rounded = torch.compile(
        lambda x: rowwise.quantize_rows(before(x).reshape(-1, k), 448.0, FP8), dynamic=False
    )
    alone(x), rounded(x)
    row = {
        "rows": m,
        "k": k,
        "kind": kind,
        "bf16_ms": milliseconds(lambda: alone(x)),
        "fp8_ms": milliseconds(lambda: rounded(x)),
    }
    if CUDA:
        row["kernels"] = kernels_of(lambda: rounded(x))["count"]
        torch._dynamo.reset()
        best = torch.compile(
            lambda x: rowwise.quantize_rows(before(x).reshape(-1, k), 448.0, FP8),
            dynamic=False,
            options={"triton.multi_kernel": 1},
        )
        best(x)
        row["fp8_best_of_loop_and_register_ms"] = milliseconds(lambda: best(x))
        if kind != "norm":
            parts, names = [x.view(m, k)], ["gelu_tanh" if kind == "gelu" else "none"]
            row["fp8_own_kernel_ms"] = milliseconds(
                lambda: torch.ops.ditopt.quantize_rows(parts, names, FP8)
            )
    return row


def model_process(name: str, folder: Path, rounds: int, tiny: bool) -> None:
    """Compile all variants of a model, wait for the word, time them, measure memory."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.config.recompile_limit = 64
    model, inputs = build(name, DEVICE, tiny=tiny)
    torch.compile(lambda x: x.sin().sum())(torch.ones(4096, device=DEVICE))
    if CUDA:
        torch.cuda.synchronize()
    result: dict[str, Any] = {"model": name, "title": SHAPES[name].title, "variants": {}}
    with torch.no_grad():
        torch.compile(model, backend="ditopt_eager")(**inputs)
        graph = compiled_graphs(model)[-1]
        sites = candidates(graph, min_rows=1 if tiny else MIN_ROWS)
        shapes = Counter((int(s.rows), s.in_features, s.out_features) for s in sites)
        plan = uniform_plan(model, graph, rule(format="fp8_row"), sites)
        variants: dict[str, dict[str, Any]] = {
            "torch.compile": {},
            "ditopt": {"backend": "ditopt"},
            "ditopt, fp8": {"backend": "ditopt", "options": {"plan": plan}},
            "ditopt, fp8, own rounding": {
                "backend": "ditopt",
                "options": {"plan": plan, "rounding_kernel": True},
            },
        }
        if name in LONG:
            del variants["ditopt"]
        calls, first = {}, None
        for label, arguments in variants.items():
            run = torch.compile(model, **arguments)
            calls[label] = lambda run=run: run(**inputs)[0]
            with fresh_cache():
                out, first_ms = timed(calls[label])
            first = out if first is None else first
            row = {"first_call_s": first_ms / 1e3, "error": relative_l2(out, first)}
            result["variants"][label] = row
            print(name, label, row, flush=True)
        record = compiled_graphs(model)[-1]
        told = [d for d in record.decisions if d.rule == "quantize_linears"]
        result["decisions"] = dict(Counter(d.reason for d in told))
        result["shapes"] = [[*shape, count] for shape, count in sorted(shapes.items())]
        _write(folder / f"{name}.ready", result)
        while not (folder / f"{name}.go").exists():
            time.sleep(0.2)
        samples = interleave(calls, rounds)
        for label, times in samples.items():
            spread = Spread.of(times)
            ratios = [b / a for a, b in zip(times, samples["torch.compile"], strict=True)]
            result["variants"][label] |= {
                "ms": spread.median_ms,
                "ms_iqr": spread.iqr_ms,
                "speedup": statistics.median(ratios),
            }
        if CUDA:
            result["profiles"] = {label: kernels_of(run) for label, run in calls.items()}
        _write(folder / f"{name}.json", result)
        calls.clear()
        del run, first, out
        result["memory"] = _memory(model, plan, sites, inputs)
    _write(folder / f"{name}.json", result)


def _memory(model: Any, plan: Any, sites: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Bytes on the device before and after the originals of quantized weights were let go."""
    parameters = dict(model.named_parameters())
    linear = sum(parameters[f"{site.id}.weight"].nbytes for site in sites)
    options = {"plan": plan, "release_weights": True}
    torch.compiler.reset()
    gc.collect()
    before = torch.cuda.memory_allocated() if CUDA else None
    run = torch.compile(model, backend="ditopt", options=options)
    run(**inputs)
    synchronize()
    gc.collect()
    derived = compiled_graphs(model)[-1].derived
    assert derived is not None
    held = sum(t.nbytes for t in derived.tensors if t.release and "scale" in t.names)
    after = torch.cuda.memory_allocated() if CUDA else None
    return {
        "linear_bytes_before": linear,
        "linear_bytes_after": held,
        "model_bytes_before": before,
        "model_bytes_after": after,
    }


def quality_process(folder: Path, seeds: int, tiny: bool) -> None:
    """W8A8 of the trained model against eager, beside what torch.compile alone changes."""
    from ditopt.demo import demo_workload
    from ditopt.metrics import compare
    from ditopt.quantization.statistics import plan_tensors, watch
    from ditopt.workload import load_workload

    workload = load_workload(demo_workload())
    ((name, model),) = workload.models.items()
    torch._dynamo.config.recompile_limit = 64
    audit = range(5000, 5000 + seeds)
    with torch.no_grad():
        with watch(model) as seen:
            workload.run(0, {name: model})
        truth = [workload.run(seed, {name: model}) for seed in audit]
        rows: dict[str, Any] = {}

        def measure(label: str, **arguments: Any) -> None:
            torch.compiler.reset()
            run = torch.compile(model, **arguments)
            found = [
                compare(workload.run(seed, {name: run}), exact, workload.data_range)
                for seed, exact in zip(audit, truth, strict=True)
            ]
            rows[label] = {"psnr_db": [q.psnr_db for q in found]}
            rows[label]["mean_psnr_db"] = statistics.fmean(rows[label]["psnr_db"])
            print("quality", label, rows[label], flush=True)
            _write(folder / "quality.json", rows)

        measure("torch.compile")
        measure("ditopt", backend="ditopt")
        graph = compiled_graphs(model)[-1]
        sites = candidates(graph, min_rows=MIN_ROWS)
        calls = 20
        for label, fields in QUALITY.items():
            plan = uniform_plan(
                model, graph, rule(**fields), sites, calls=calls, statistics=plan_tensors(seen)
            )
            measure(label, backend="ditopt", options={"plan": plan})


QUALITY: dict[str, dict[str, Any]] = {
    "fp8": {"format": "fp8_row"},
    "fp8, centred": {"format": "fp8_row", "transform": "centre"},
    "int8": {"format": "int8_row"},
    "int8, balanced": {"format": "int8_row", "transform": "balance"},
    "int8, centred": {"format": "int8_row", "transform": "centre"},
    "int8, rotated": {"format": "int8_row", "transform": "rotate"},
}


def bound_of(result: dict[str, Any], products: dict[tuple[int, int, int], Any]) -> float:
    """Speedup of torch.compile's step if each quantized layer took its fp8 time in the table."""
    step = result["variants"]["torch.compile"]["ms"]
    saved = 0.0
    for m, k, n, count in result["shapes"]:
        row = products[m, k, n]
        saved += count * (row["bf16_ms"] - row["fp8_ms" if CUDA else "fp8_with_quantization_ms"])
    return float(step / (step - saved))


def _write(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", nargs="*", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FOLDER"))
    options = parser.parse_args()
    if options.child:
        name, folder = options.child
        if name == "quality":
            quality_process(Path(folder), options.seeds, options.tiny)
        else:
            model_process(name, Path(folder), options.rounds, options.tiny)
        return
    run_all(options)


def run_all(options: argparse.Namespace) -> None:
    results: dict[str, Any] = {
        "environment": describe_environment(DEVICE),
        "fast_accumulation": rowwise.FAST_ACCUMULATION,
        "products": [],
        "producers": [],
        "models": [],
    }

    def save() -> None:
        if options.output is not None:
            _write(options.output, results)

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        flags = ["--rounds", str(options.rounds), "--seeds", str(options.seeds)]
        flags += ["--tiny"] * options.tiny
        children = {
            child: subprocess.Popen(
                [sys.executable, __file__, *flags, "--child", child, str(folder)]
            )
            for child in [*options.models, *(["quality"] * (not options.no_quality))]
        }
        ready = _await(folder, ".ready", options.models, children)
        shapes = {tuple(s[:3]) for r in ready.values() for s in r["shapes"]}
        if "quality" in children:
            children["quality"].wait()
            results["quality"] = _read(folder / "quality.json")
        wanted = sorted({(64, 32, 48)} | shapes if options.tiny else {*ANCHORS, *MERGED, *shapes})
        for m, k, n in wanted:
            results["products"].append(
                gemm(
                    m,
                    k,
                    n,
                    whole=options.tiny or (m, k, n) in ANCHORS + MERGED,
                    int8=(m, k, n) in ANCHORS[:4],
                )
            )
            print(results["products"][-1], flush=True)
        save()
        for shape in [(64, 32, "norm")] if options.tiny else PRODUCERS:
            results["producers"].append(producer(*shape))
            print(results["producers"][-1], flush=True)
        save()
        if CUDA:
            torch.cuda.empty_cache()
        products = {(r["m"], r["k"], r["n"]): r for r in results["products"]}
        for child in ready:
            (folder / f"{child}.go").touch()
            children[child].wait()
            found = _read(folder / f"{child}.json")
            if "ms" not in found["variants"]["torch.compile"]:
                continue
            found["bound"] = bound_of(found, products)
            profiles = found.pop("profiles", {})
            for label, profile in profiles.items():
                found["variants"][label] |= {
                    "kernels": profile["count"],
                    "kernels_ms": profile["ms"],
                }
                found["variants"][label]["longest"] = profile["longest"][:14]
            results["models"].append(found)
            print(json.dumps(found), flush=True)
            save()
    print(table(results))


def _await(
    folder: Path, suffix: str, names: list[str], children: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Results of the processes that reach a point; those that end before are left out."""
    found: dict[str, dict[str, Any]] = {}
    waiting = set(names)
    while waiting:
        for name in sorted(waiting):
            path = folder / f"{name}{suffix}"
            if path.exists():
                found[name] = _read(path)
                waiting.discard(name)
            elif children[name].poll() is not None:
                print(f"{name} ended early", flush=True)
                waiting.discard(name)
        time.sleep(0.2)
    return {name: found[name] for name in names if name in found}


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def table(results: dict[str, Any]) -> str:
    """What to read first."""
    lines = []
    for found in results["models"]:
        rows = found["variants"]
        for label, row in rows.items():
            lines.append(
                f"{found['model']:8} {label:14} {row['ms']:9.3f} ms  {row['speedup']:.3f}x  "
                f"first call {row['first_call_s']:.1f} s"
            )
        lines.append(
            f"{found['model']:8} bound {found['bound']:.3f}x  memory {found.get('memory')}"
        )
    for label, row in results.get("quality", {}).items():
        lines.append(f"quality  {label:16} {row['mean_psnr_db']:.2f} dB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
