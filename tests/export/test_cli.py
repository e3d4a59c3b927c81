"""`ditopt export`, `run` and `bench --engine`, and TensorRT where it is not installed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import fx
from typer.testing import CliRunner

from ditopt import cli
from ditopt.backends.tensorrt import TensorRTExporter
from ditopt.errors import EngineError
from ditopt.export.sample import bench_variants, sample_to_file
from ditopt.workload import load_workload

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WORKLOAD = """
import torch
from ditopt import Workload

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x, timestep):
        return self.layer(x) * timestep[:, None]

def sample(model, seed):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    return x - model(x, torch.full((2,), 0.5))

def frames(result):
    shades = (result[:, :1].sigmoid() * 255).to(torch.uint8)
    return shades[:, :, None, None].expand(2, 6, 8, 3).numpy()

def workload():
    torch.manual_seed(0)
    return Workload(Small().eval().requires_grad_(False), sample, frames=frames)

def another():
    return Workload(torch.nn.Linear(4, 2).eval(), lambda model, seed: model(torch.ones(1, 4)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "mine.py").write_text(WORKLOAD)
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> Any:
    """What exporting told; the engine lies in `folder / "engine"`."""
    args = ["export", str(folder / "mine.py"), "--format", "onnx", "-o", str(folder / "engine")]
    done = CliRunner().invoke(cli.app, [*args, "--json", "-"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def refuse(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: str) -> str:
    """The one line of a command that ends with code 2."""
    monkeypatch.setattr(sys, "argv", ["ditopt", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ditopt: ")]
    assert len(lines) == 1
    return lines[0]


def test_export_tells_what_it_wrote(folder: Path, report: Any) -> None:
    assert report["format"] == "onnx"
    assert report["engine_error"] < 1e-5
    files = [path for path in (folder / "engine").rglob("*") if path.is_file()]
    assert report["nbytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize(("ending", "frames"), [("gif", 2), ("png", 1)])
def test_run_draws_with_the_engine(folder: Path, report: Any, ending: str, frames: int) -> None:
    out = folder / f"out.{ending}"
    args = ["run", str(folder / "mine.py"), "--engine", str(folder / "engine"), "--seed", "3"]
    pinned = ["--expect-sha256", report["sha256"], "-o", str(out), "--json", "-"]
    done = CliRunner().invoke(cli.app, [*args, *pinned], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["frames"] == 2
    with Image.open(out) as picture:
        assert getattr(picture, "n_frames", 1) == frames


def test_run_writes_a_video(folder: Path) -> None:
    av = pytest.importorskip("av")
    out = folder / "out.mp4"
    args = ["run", str(folder / "mine.py"), "-o", str(out), "--json", "-"]
    done = CliRunner().invoke(cli.app, args, catch_exceptions=False)
    assert json.loads(done.stdout)["frames"] == 2
    workload = load_workload(str(folder / "mine.py"))
    expected = workload.frames(workload.run(0))[:, 0, 0]  # every frame has one shade
    with av.open(str(out)) as container:
        found = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    assert [picture.shape for picture in found] == [(192, 256, 3)] * 2
    for picture, shade in zip(found, expected, strict=True):
        assert abs(picture.astype(int) - shade.astype(int)).max() <= 4  # 4:2:0 and rounding


def test_each_call_of_the_denoiser_is_told(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    workload = load_workload(str(folder / "mine.py"))
    out = folder / "told.png"
    sample_to_file(workload, None, out, seed=0, progress=lambda *news: told.append(news))
    assert told == [("sampling", 0, 0), ("sampling", 1, 0)]


def test_bench_gets_a_variant(folder: Path, report: Any) -> None:
    workload = load_workload(str(folder / "mine.py"))
    variants, plan = bench_variants(workload, None, folder / "engine")
    assert plan is None
    assert list(variants) == ["eager", "inductor", "ditopt", "engine"]
    engine = variants["engine"](next(iter(workload.models.values())))
    torch.testing.assert_close(workload.run(5, {"model": engine}), workload.run(5))


def test_bad_requests_end_with_one_line(
    folder: Path, report: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mine, engine, out = str(folder / "mine.py"), str(folder / "engine"), str(folder / "x.gif")
    missing = refuse(monkeypatch, capsys, "run", mine, "--engine", str(folder), "-o", out)
    assert "is no engine: cannot read manifest.json" in missing
    pinned = ("run", mine, "--engine", engine, "-o", out, "--expect-sha256", "00")
    assert "its sha256 is" in refuse(monkeypatch, capsys, *pinned)
    other = refuse(monkeypatch, capsys, "bench", f"{mine}:another", "--engine", engine)
    assert "architecture: the engine was made from Small" in other
    assert "cannot draw" in refuse(monkeypatch, capsys, "run", mine, "-o", str(folder / "x.avi"))
    monkeypatch.setitem(sys.modules, "av", None)
    line = refuse(monkeypatch, capsys, "run", mine, "-o", str(folder / "x.mp4"))
    assert "needs PyAV" in line
    assert "pip install 'ditopt[video]'" in line
    wrong = refuse(monkeypatch, capsys, "export", mine, "-o", engine, "--format", "exe")
    assert "unknown format 'exe'" in wrong


def test_tensorrt_without_its_libraries_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """torch_tensorrt raises a bare Exception where TensorRT's libraries are missing."""

    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "torch_tensorrt":
                raise Exception("Could not find libnvinfer.so.11")

    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    args = ("export", str(folder / "mine.py"), "--format", "tensorrt", "-o", str(folder / "trt"))
    line = refuse(monkeypatch, capsys, *args)
    assert "torch_tensorrt cannot be imported (Could not find libnvinfer.so.11)" in line
    assert "trtexec --onnx" in line
    assert not (folder / "trt").exists()


def test_tensorrt_is_called_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch_tensorrt: what is checked is our side of the interface."""
    seen: dict[str, Any] = {}

    def compile_program(program: Any, **options: Any) -> str:
        seen["program"], seen["options"] = program, options
        if seen.get("refuse"):
            raise RuntimeError("Unsupported operator")
        return "compiled"

    def save(module: Any, path: str, **options: Any) -> None:
        seen["saved"] = (module, path, options["output_format"])

    stand_in: Any = types.ModuleType("torch_tensorrt")
    stand_in.Input = lambda shape, dtype: (shape, dtype)
    stand_in.dynamo = types.SimpleNamespace(compile=compile_program)
    stand_in.save = save
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    graph.output((graph.call_function(torch.ops.aten.relu.default, (x,)),))
    gm = fx.GraphModule({}, graph)
    path = tmp_path / "0.ep"
    assert TensorRTExporter().export(gm, path, {}) == []
    assert isinstance(seen["program"], torch.export.ExportedProgram)
    assert seen["options"] == {
        "arg_inputs": [((2, 3), torch.float32)],
        "require_full_compilation": True,
    }
    assert seen["saved"] == ("compiled", str(path), "exported_program")
    seen["refuse"] = True
    with pytest.raises(EngineError, match="TensorRT refuses the model: Unsupported operator"):
        TensorRTExporter().export(gm, path, {})
