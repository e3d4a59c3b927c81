"""Native programs: compiled, run without ditopt in Python and in C++. Minutes of compilation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.small_dit import arguments
from safetensors.torch import load_file, save_file

from ditopt.errors import EngineError
from ditopt.export.engine import Engine
from ditopt.export.recording import RecordedCall, record
from ditopt.export.run import export
from ditopt.export.verify import worst_error

from .engines import with_int8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
RUNNER = Path(__file__).parents[2] / "examples" / "engine_runner"


@pytest.fixture(scope="module")
def folder(workload: Any, plan: Any, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse heads, skipped calls and 8-bit layers, each in some of the calls."""
    path = tmp_path_factory.mktemp("pt2")
    full = with_int8(plan, model, arguments(model))
    report = export(workload, path / "engine", full)
    assert report.engine_error < 1e-3
    assert report.notes == ()  # the executors are those of the compiled model
    return path


@pytest.fixture(scope="module")
def calls(folder: Path, workload: Any) -> list[RecordedCall]:
    """Those of a loop with the engine, which are also the runners' input."""
    engine = Engine.load(folder / "engine", verify_borders=True)
    recorded = list(record(workload, "model", seed=0, model=engine))
    flat = {
        f"{number}.{name}": value.contiguous().clone()
        for number, call in enumerate(recorded)
        for name, value in call.kwargs.items()
    }
    save_file(flat, str(folder / "calls.safetensors"))
    return recorded


def compare(path: Path, calls: list[RecordedCall]) -> None:
    results = load_file(str(path))
    assert len(results) == len(calls)
    for number, call in enumerate(calls):
        assert worst_error(results[f"{number}.0"], call.result) < 1e-6


def test_weights_are_in_the_folder_once(folder: Path, workload: Any) -> None:
    weights = sum(p.nbytes for p in workload.models["model"].parameters())
    stored = (folder / "engine" / "weights.safetensors").stat().st_size
    # The layers that only some calls round are there twice, in 32 bits and in 8.
    assert stored < 1.25 * weights + 50_000  # block lists and a header


def test_a_process_without_ditopt_runs_it(folder: Path, calls: list[RecordedCall]) -> None:
    out = folder / "python.safetensors"
    arguments = [str(folder / "engine"), str(folder / "calls.safetensors"), str(out)]
    block = "import runpy, sys; sys.modules['ditopt'] = None; sys.argv = sys.argv[1:]; "
    run = f"runpy.run_path({str(RUNNER / 'run.py')!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", block + run, "run.py", *arguments], check=True)
    compare(out, calls)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_process_without_python_runs_it(folder: Path, calls: list[RecordedCall]) -> None:
    binary, out = folder / "engine_runner", folder / "cpp.safetensors"
    subprocess.run([sys.executable, str(RUNNER / "build.py"), str(binary)], check=True)
    arguments = [str(folder / "engine"), str(folder / "calls.safetensors"), str(out)]
    subprocess.run([str(binary), *arguments], check=True)
    compare(out, calls)
    failed = subprocess.run(
        [str(binary), str(folder), *arguments[1:]], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert "manifest.json" in failed.stderr


def test_a_wrong_size_is_refused_before_native_code(
    folder: Path, calls: list[RecordedCall]
) -> None:
    engine = Engine.load(folder / "engine")
    given = dict(calls[0].kwargs)
    given["hidden_states"] = torch.zeros(1, 3, 16, 16)
    with pytest.raises(EngineError, match=r"^hidden_states: the engine was exported for"):
        engine(**given)
