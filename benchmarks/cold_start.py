"""The first call of a published shape in a new process: torch.compile and ditopt, cold and warm.

    python benchmarks/cold_start.py --output benchmarks/results/cold_start_h200.json
    python benchmarks/cold_start.py --tiny      # on a CPU, in a minute or two

Every number comes from a process of its own: one with empty compiler caches (cold), then one that
finds the caches of the former (warm). Not counted are imports, building the model, one eager call
(which starts the GPU's libraries) and one small `torch.compile` (which starts the compiler's
workers). Variants take turns, and each is repeated: medians and extremes are written, and for
ditopt where the seconds go. Models that the output file has already are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BACKENDS = {"inductor": "inductor", "ditopt": "ditopt"}


def child(name: str, backend: str, tiny: bool) -> dict[str, Any]:
    """Seconds of the first call, and what is known of its parts."""
    import torch
    from shapes import build

    from ditopt.environment import describe_environment
    from ditopt.timing import synchronize
    from ditopt.torch_backend import compiled_graphs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        model, inputs = build(name, device, tiny=tiny)
        model(**inputs)
        torch.compile(lambda x: x.sin().sum())(torch.ones(4096, device=device))
        synchronize()
        torch._dynamo.utils.compilation_time_metrics.clear()
        run = torch.compile(model, backend=backend)
        started = time.perf_counter()
        run(**inputs)
        synchronize()
        total = time.perf_counter() - started
        started = time.perf_counter()
        run(**inputs)
        synchronize()
        second = time.perf_counter() - started
    metrics = torch._dynamo.utils.compilation_time_metrics
    spans = {key: sum(values) for key, values in metrics.items()}
    parts = {
        "frame": spans.get("_compile.compile_inner", 0.0),
        "backend": spans.get("OutputGraph.call_user_compiler", 0.0),
        "inductor": spans.get("compile_fx_inner", 0.0),
    }
    parts["dynamo"] = parts["frame"] - parts["backend"]
    parts["first run"] = total - parts["frame"]
    records = compiled_graphs(model)
    seconds = records[0].seconds if records else {}
    environment = describe_environment(device)
    return {
        "first_call_s": total,
        "second_call_s": second,
        "parts_s": parts,
        "ditopt_s": seconds,
        "environment": environment,
    }


def measure(name: str, backend: str, tiny: bool, cache: str) -> dict[str, Any]:
    """One process."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, "--child", name, backend, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {backend}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, for a dry run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments.tiny)))
        return
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        backend: {"cold": [], "warm": []} for backend in BACKENDS
    }
    for _ in range(arguments.repeats):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    one = measure(arguments.model, backend, arguments.tiny, cache)
                    runs[backend][state].append(one)
                    shown = {k: round(v, 2) for k, v in one["parts_s"].items()}
                    print(backend, state, f"{one['first_call_s']:.2f} s", shown, flush=True)
    rows = []
    for backend, states in runs.items():
        for state, ones in states.items():
            times = [one["first_call_s"] for one in ones]
            middle = min(ones, key=lambda one: abs(one["first_call_s"] - statistics.median(times)))
            row = {"variant": backend, "state": state, "first_call_s": statistics.median(times)}
            row |= {"least_s": min(times), "most_s": max(times), "runs": len(times)}
            rows.append(row | {key: middle[key] for key in ("parts_s", "ditopt_s")})
    by = {(row["variant"], row["state"]): row["first_call_s"] for row in rows}
    ratios = {state: by["ditopt", state] / by["inductor", state] for state in ("cold", "warm")}
    print(json.dumps(ratios))
    if arguments.output is not None:
        result = {"environment": runs["ditopt"]["cold"][0]["environment"], "models": []}
        if arguments.output.exists():
            result["models"] = json.loads(arguments.output.read_text())["models"]
        kept = [one for one in result["models"] if one["model"] != arguments.model]
        one = {"model": arguments.model, "tiny": arguments.tiny, "rows": rows}
        result["models"] = [*kept, one | {"ratio_to_inductor": ratios}]
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
