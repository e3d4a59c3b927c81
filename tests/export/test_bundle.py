"""Folders of engines: written whole or not at all, and refused when anything in them is wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ditopt.errors import EngineError, FileError, VerificationError
from ditopt.export import compare
from ditopt.export.bundle import new_folder
from ditopt.export.engine import Engine
from ditopt.export.run import export
from ditopt.export.verify import worst_error
from ditopt.workload import Workload

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Small(nn.Module):
    """Little enough to be written in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B, 4], [B] -> [B, 4]."""
        return self.layer(x) * timestep[:, None]


def small_workload(module: nn.Module | None = None) -> Workload:
    torch.manual_seed(0)
    model = (module or Small()).eval().requires_grad_(False)

    def loop(stand_in: Any, seed: int) -> Tensor:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        for t in (2.0, 1.0):
            x = x - 0.1 * stand_in(x, torch.full((2,), t))
        return x

    return Workload(model, loop)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX engine that pretends to be in our native format as far as loading checks go."""
    path = tmp_path_factory.mktemp("engines") / "engine"
    export(small_workload(), path, format="onnx")
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "engine"
    shutil.copytree(original, copied)
    return copied


def rewrite(folder: Path, change: Any) -> None:
    """Edit the manifest, with the hashes of the files as they are now."""
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    for name in document["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            record = {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}
            document["files"][name] = record
    (folder / "manifest.json").write_text(json.dumps(document))


def with_weights(document: dict[str, Any]) -> None:
    spec = {"shape": [2], "stride": [1], "dtype": "float32", "device": "cpu"}
    document["tensors"] = {"w": spec}
    document["files"]["weights.safetensors"] = {}


def test_it_runs_in_the_loop_and_pins_its_manifest(original: Path) -> None:
    workload = small_workload()
    sha256 = hashlib.sha256((original / "manifest.json").read_bytes()).hexdigest()
    engine = Engine.load(original, sha256.upper())
    assert worst_error(workload.run(3, {"model": engine}), workload.run(3)) < 1e-6
    with pytest.raises(EngineError, match=r"its sha256 is .*, expected 000"):
        Engine.load(original, "0" * 64)


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_truncated_or_longer_file_is_named(folder: Path, size: int) -> None:
    path = folder / "programs" / "0.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:size] if size >= 0 else data + b"x")
    with pytest.raises(EngineError, match=r"^files.programs/0.onnx: has \d+ bytes"):
        Engine.load(folder)


def test_a_flipped_bit_and_a_missing_file_are_named(folder: Path) -> None:
    path = folder / "programs" / "0.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"^files.programs/0.onnx: its contents were changed"):
        Engine.load(folder)
    path.unlink()
    with pytest.raises(EngineError, match=r"^files.programs/0.onnx: No such file"):
        Engine.load(folder)


def test_a_program_that_is_none_is_refused_by_its_runtime(folder: Path) -> None:
    (folder / "programs" / "0.onnx").write_bytes(b"nothing")
    rewrite(folder, lambda document: None)
    with pytest.raises(EngineError, match=r"^0.onnx: onnxruntime refuses this model"):
        Engine.load(folder)
    (folder / "programs" / "0.pt2").write_bytes(b"nothing")

    def native(document: dict[str, Any]) -> None:
        document["format"] = "pt2"
        document["programs"][0]["file"] = "programs/0.pt2"
        document["files"]["programs/0.pt2"] = {}

    rewrite(folder, native)
    with pytest.raises(EngineError, match=r"^0.pt2: the runtime cannot load this program"):
        Engine.load(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(folder / "programs" / "0.onnx", outside)
    (folder / "programs" / "0.onnx").symlink_to(outside)
    with pytest.raises(EngineError, match=r"^files.programs/0.onnx: leads out of the engine"):
        Engine.load(folder)


def test_a_pickle_is_no_weights_file(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(pickle.dumps({"w": torch.zeros(2)}))
    rewrite(folder, with_weights)
    with pytest.raises(EngineError, match=r"^weights.safetensors: not a safetensors file"):
        Engine.load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.zeros(3)}, r"^tensors.w: expected float32\[2\].*holds float32\[3\]"),
        ({"w": torch.zeros(2).half()}, r"^tensors.w: .*holds float16\[2\]"),
        ({"v": torch.zeros(2)}, r"^tensors.[vw]: .* does not know it"),
    ],
)
def test_weights_are_what_the_manifest_says(
    folder: Path, tensors: dict[str, Tensor], message: str
) -> None:
    safetensors.torch.save_file(tensors, str(folder / "weights.safetensors"))
    rewrite(folder, with_weights)
    with pytest.raises(EngineError, match=message):
        Engine.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pt2", "environment": {"torch": "1.0.0"}}, r"^environment.torch: .* 1\.0\.0"),
        ({"format": "pt2", "environment": {}}, "^environment.torch: "),
        ({"device": "cuda"}, "^device: "),
        ({"ditopt_engine": 7}, "^ditopt_engine: expected version 1, got 7"),
    ],
)
def test_another_version_or_device_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    rewrite(folder, lambda document: document.update(change))
    with pytest.raises(EngineError, match=message):
        Engine.load(folder)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damage_to_any_file_is_noticed(original: Path, data: st.DataObject) -> None:
    """Cut, grown, or any byte changed: the file is named before anything of it is used."""
    files = json.loads((original / "manifest.json").read_text())["files"]
    names = sorted(name for name, record in files.items() if record["nbytes"])
    name = data.draw(st.sampled_from([*names, "manifest.json"]))
    content = (original / name).read_bytes()
    kind = data.draw(st.sampled_from(["cut", "grow", "change"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        damaged = content[:at]
    elif kind == "grow":
        damaged = content + data.draw(st.binary(min_size=1, max_size=8))
    else:
        flipped = content[at] ^ data.draw(st.integers(1, 255))
        damaged = content[:at] + bytes([flipped]) + content[at + 1 :]
    sha256 = hashlib.sha256((original / "manifest.json").read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "engine"
        shutil.copytree(original, folder)
        (folder / name).write_bytes(damaged)
        with pytest.raises(EngineError) as caught:
            Engine.load(folder, sha256)
    assert name in str(caught.value)


def test_a_plan_that_is_not_the_engine_s_is_refused(folder: Path) -> None:
    """Its file may be whole and listed: the programs were compiled for another one."""
    (folder / "plan.yaml").write_text("ditopt_plan: 1\n")

    def with_plan(document: dict[str, Any]) -> None:
        document["plan"] = "0" * 64
        document["files"]["plan.yaml"] = {}

    rewrite(folder, with_plan)
    with pytest.raises(EngineError, match=r"^plan: plan.yaml has sha256 .*, expected 000"):
        Engine.load(folder)
    sha256 = hashlib.sha256((folder / "plan.yaml").read_bytes()).hexdigest()
    rewrite(folder, lambda document: document.update(plan=sha256))
    with pytest.raises(EngineError, match=r"^plan: plan.yaml: "):
        Engine.load(folder)


@pytest.mark.parametrize("place", ["../outside.data", "/etc/passwd"])
def test_weights_outside_of_the_folder_are_refused(folder: Path, place: str) -> None:
    """An ONNX model says itself in which file its weights are."""
    onnx = pytest.importorskip("onnx")
    (path,) = (folder / "programs").glob("*.onnx")
    model = onnx.load(str(path))
    (weight,) = (x for x in model.graph.initializer if list(x.dims) == [4, 4])
    data = weight.raw_data

    def keep_weights_in(location: str) -> None:
        weight.raw_data = data
        onnx.external_data_helper.set_external_data(weight, location, offset=0, length=64)
        weight.ClearField("raw_data")
        path.write_bytes(model.SerializeToString())
        rewrite(folder, lambda document: None)

    for target in (folder / "outside.data", path.with_name("inside.data")):
        target.write_bytes(data)
    keep_weights_in("inside.data")
    Engine.load(folder)
    keep_weights_in(place)
    with pytest.raises(EngineError, match=r"^0.onnx: onnxruntime refuses this model"):
        Engine.load(folder)


def test_a_header_with_an_absurd_shape_is_refused(folder: Path) -> None:
    """A safetensors file whose header promises a terabyte."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 8]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    (folder / "weights.safetensors").write_bytes(data)
    rewrite(folder, with_weights)
    with pytest.raises(EngineError, match=r"^weights.safetensors: not a safetensors file"):
        Engine.load(folder)
    (folder / "weights.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    rewrite(folder, with_weights)
    with pytest.raises(EngineError, match=r"^weights.safetensors: not a safetensors file"):
        Engine.load(folder)


def test_a_folder_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no engine: cannot read manifest.json"):
        Engine.load(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(EngineError, match=r"manifest.json is not a text"):
        Engine.load(tmp_path)


def test_an_older_engine_is_replaced_and_anything_else_is_kept(
    original: Path, folder: Path
) -> None:
    (folder / "stray").write_text("old")
    with new_folder(folder) as temporary:
        (temporary / "manifest.json").write_text("new")
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]
    mine = folder.parent / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FileError, match="is not an engine"), new_folder(mine):
        pass
    assert (mine / "thesis.txt").read_text() == "irreplaceable"
    with pytest.raises(FileError, match="cannot write"), new_folder(mine / "no" / "where"):
        pass


class Fades(nn.Module):
    """Python state that changes from call to call: torch.export freezes it without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.strength = [1.0]

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B, 4], [B] -> [B, 4]."""
        result = self.layer(x) * self.strength[0] + timestep[:, None]
        if not torch.compiler.is_compiling():
            self.strength[0] *= 0.5
        return result


class LosesAWrite(nn.Module):
    """A write through `.data` into a new tensor."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B, 4], [B] -> [B, 4]."""
        y = x.new_zeros(2, 4, requires_grad=False)
        y.data[:, 1:].copy_(x[:, 1:])
        return y + timestep[:, None]


class Branches(nn.Module):
    """The graph depends on a value."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B, 4], [B] -> [B, 4]."""
        return x if timestep.sum() > 3 else x * 2


def left_behind(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Fades, "cannot export Fades: .*wrong program without saying so"),
        (
            LosesAWrite,
            "cannot export LosesAWrite: non-strict: RuntimeError.*; strict: RuntimeError",
        ),
        (Branches, "cannot export Branches: non-strict: .*; strict: "),
    ],
)
def test_what_torch_exports_wrongly_or_not_at_all_leaves_no_engine(
    tmp_path: Path, module: type[nn.Module], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        export(small_workload(module()), tmp_path / "engine", format="onnx")
    assert left_behind(tmp_path) == []


def test_a_wrong_engine_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last comparison holds back whatever the steps before it let through."""
    monkeypatch.setattr(compare, "tolerance", lambda result: -1.0)
    with pytest.raises(VerificationError, match="the engine is wrong at call 0"):
        export(small_workload(), tmp_path / "engine", format="onnx")
    assert left_behind(tmp_path) == []
