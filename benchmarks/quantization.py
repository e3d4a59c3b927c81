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
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # modules beside this one must not hide the standard library's
    sys.path.append(sys.path.pop(0))

import torch
from quantization_models import model_process, quality_process, write_json
from quantization_products import (
    ANCHORS,
    CUDA,
    DEVICE,
    MERGED,
    PRODUCERS,
    gemm,
    producer,
)
from shapes import SHAPES

from ditopt.environment import describe_environment
from ditopt.quantization import rowwise


def bound_of(result: dict[str, Any], products: dict[tuple[int, int, int], Any]) -> float:
    """Speedup of torch.compile's step if each quantized layer took its fp8 time in the table."""
    step = result["variants"]["torch.compile"]["ms"]
    saved = 0.0
    for m, k, n, count in result["shapes"]:
        row = products[m, k, n]
        saved += count * (row["bf16_ms"] - row["fp8_ms" if CUDA else "fp8_with_quantization_ms"])
    return float(step / (step - saved))


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
            write_json(options.output, results)

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
