"""Every architecture of the tests' zoo as an engine: which formats it exports to, and how exactly.

    python benchmarks/export_zoo.py --engines engines     # everything, hours on two cores
    python benchmarks/export_zoo.py --formats onnx wan flux

A pt2 engine is run three ways: by `ditopt.Engine`, by `examples/engine_runner/run.py` in a process
that cannot import ditopt, and by the model itself, which it is compared with (relative L2, two
calls, float32). An ONNX engine runs in onnxruntime, at opset 23 and at the fallback opset 18.
Results are written after each model; rows already in the file are kept, and engines in --engines
are not compiled again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file, save_file  # noqa: E402

from ditopt.backends.tensorrt import undocumented_operators  # noqa: E402
from ditopt.environment import describe_environment  # noqa: E402
from ditopt.errors import DitoptError  # noqa: E402
from ditopt.export.engine import Engine  # noqa: E402
from ditopt.export.recording import record  # noqa: E402
from ditopt.export.run import export  # noqa: E402
from ditopt.export.values import bind, describe_result  # noqa: E402
from ditopt.export.verify import relative_error  # noqa: E402
from ditopt.files import write_text  # noqa: E402
from ditopt.workload import Workload  # noqa: E402
from tests.zoo.models import ZOO, build, first_tensor, kwargs_for  # noqa: E402

TOLERANCE = 1e-5
TIMESTEPS = (700.0, 300.0)
FORMATS = {"pt2": ("pt2", {}), "onnx": ("onnx", {"opset": 23}), "onnx18": ("onnx", {"opset": 18})}


def workload_of(name: str) -> Workload:
    """Two calls at different timesteps."""
    model, _ = build(name)

    def loop(stand_in: Any, seed: int) -> torch.Tensor:
        calls = (stand_in(**kwargs_for(name, t=t, seed=seed)) for t in TIMESTEPS)
        return torch.stack([first_tensor(result).clone() for result in calls])

    return Workload(model, loop)


def errors(workload: Workload, engine: Engine, folder: Path, native: bool) -> dict[str, float]:
    """Distance of the engine, and of the runner in another process, to the model."""
    worst: dict[str, float] = {"engine_error": 0.0}
    for number, call in enumerate(record(workload, "model", seed=1)):
        expected = describe_result(call.result)[1]
        with torch.no_grad():
            results = {"engine_error": describe_result(engine(*call.args, **call.kwargs))[1]}
        if native:
            results["fresh_process_error"] = elsewhere(engine, call, folder, number)
        for kind, tensors in results.items():
            found = max(relative_error(a, b) for a, b in zip(tensors, expected, strict=True))
            worst[kind] = max(worst.get(kind, 0.0), found)
    return worst


def elsewhere(engine: Engine, call: Any, folder: Path, number: int) -> list[torch.Tensor]:
    """The call's results from the runner, in a process where importing ditopt fails."""
    named = bind(engine.manifest.call.signature(), call.args, call.kwargs)
    inputs = [item.name for item in engine.manifest.call.inputs]
    with tempfile.TemporaryDirectory() as temporary:
        given, out = (str(Path(temporary) / n) for n in ("in.safetensors", "out.safetensors"))
        save_file({f"0.{n}": named[n].contiguous().clone() for n in inputs}, given)
        runner = str(ROOT / "examples" / "engine_runner" / "run.py")
        code = (
            "import runpy, sys; sys.modules['ditopt'] = None; sys.argv = sys.argv[1:]; "
            f"runpy.run_path({runner!r}, run_name='__main__')"
        )
        command = [sys.executable, "-c", code, "run.py", str(folder), given, out]
        subprocess.run(command, check=True, capture_output=True)
        results = load_file(out)
    return [results[f"0.{k}"] for k in range(len(results))]


def measure(name: str, label: str, engines: Path) -> dict[str, Any]:
    """One cell of the table; a refusal is a result too."""
    format, options = FORMATS[label]
    folder = engines / (name if label == "pt2" else f"{name}_{label}")
    try:
        workload = workload_of(name)
        row: dict[str, Any] = {}
        if not folder.exists():
            report = export(workload, folder, format=format, options=options)
            row["compile_s"] = round(report.seconds["compile"], 1)
        started = time.perf_counter()
        engine = Engine.load(folder)
        row["load_ms"] = round(1e3 * (time.perf_counter() - started), 1)
        row |= errors(workload, engine, folder, label == "pt2")
    except DitoptError as error:
        return {"passed": False, "reason": str(error)[:400]}
    files = [path for path in folder.rglob("*") if path.is_file()]
    row["nbytes"] = sum(path.stat().st_size for path in files)
    row["programs"] = len(engine.manifest.programs)
    row["weights_nbytes"] = sum(p.nbytes for p in workload.models["model"].parameters())
    if label == "onnx18":
        row["not_in_tensorrt_8_4_list"] = undocumented_operators(next(folder.rglob("*.onnx")))
    worst = max(row[key] for key in row if key.endswith("_error"))
    return {"passed": worst <= TOLERANCE, **row}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(ZOO), help="names; all by default")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--engines", type=Path, help="folder that keeps the engines")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/export_zoo_cpu.json"
    )
    arguments = parser.parse_args()
    packages = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages}
    rows: dict[str, Any] = {}
    if arguments.output.exists():
        rows = {row["model"]: row for row in json.loads(arguments.output.read_text())["rows"]}
    engines = arguments.engines or Path(tempfile.mkdtemp())
    engines.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        row = rows.setdefault(name, {"model": name})
        for label in arguments.formats:
            row[label] = measure(name, label, engines)
            print(name, label, row[label], flush=True)
        result = {
            "environment": {**describe_environment(torch.device("cpu")), "versions": versions},
            "dtype": "float32",
            "tolerance": TOLERANCE,
            "rows": [rows[model] for model in ZOO if model in rows],
        }
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
