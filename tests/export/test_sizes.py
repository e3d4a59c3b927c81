"""Open sizes: which axes they are, in which ranges the graph holds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.errors import EngineError
from ditopt.export.door import Exported, export_model
from ditopt.export.engine import Engine
from ditopt.export.manifest import Manifest
from ditopt.export.recording import CallLog
from ditopt.export.run import export
from ditopt.export.schema import TensorSpec
from ditopt.export.sizes import Range, find, parse
from ditopt.export.verify import worst_error
from ditopt.quantization import LinearRule
from ditopt.quantization.plans import uniform_plan
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import Workload


class Latents(nn.Module):
    """Patches of 2 x 2, a block of token-wise layers, pixels again; a table of 32 x 32 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layer = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8)
        self.out = nn.Linear(8, 12)
        self.register_buffer("table", torch.randn(32, 32, 8))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """[B, 3, H, W], [B], [B, L, 8] -> [B, 3, H, W]."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        y = self.patch(x).permute(0, 2, 3, 1) + self.table[:height, :width]
        y = self.layer(y) * timestep[:, None, None, None] + text.mean(1)[:, None, None]
        y = self.out(y).unflatten(-1, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return y.flatten(4, 5).flatten(2, 3)


class Packed(nn.Module):
    """Tokens with position ids beside them."""

    def forward(self, hidden: Tensor, ids: Tensor, timestep: Tensor) -> Tensor:
        """[B, N, C], [N, 1], [B] -> [B, N, C]."""
        return hidden * ids.cos() + timestep[:, None, None]


class Fixed(nn.Module):
    """One axis is a number for it, as for a model that takes the root of the token count."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B, 3, H, W], [B] -> [B, 3, H, W]."""
        return x * int(x.shape[-1]) if x.shape[-1] == 12 else x + timestep[:, None, None, None]


def given(batch: int = 1, height: int = 8, width: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + height + width)
    return {
        "x": torch.randn(batch, 3, height, width, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "text": torch.randn(batch, 5, 8, generator=generator),
    }


def packed(batch: int = 2, tokens: int = 24) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(batch, tokens, 4),
        "ids": torch.arange(tokens).float()[:, None],
        "timestep": torch.full((batch,), 0.5),
    }


def workload_of(model: nn.Module, arguments: dict[str, Tensor]) -> Workload:
    model = model.eval().requires_grad_(False)
    main = next(iter(arguments))

    def loop(stand_in: Any, seed: int) -> Tensor:
        first = stand_in(**arguments)
        result: Tensor = stand_in(**{**arguments, main: arguments[main] + 1}) + first
        return result

    return Workload(model, loop)


def opened(model: nn.Module, arguments: dict[str, Tensor], *wanted: str) -> Exported:
    workload = workload_of(model, arguments)
    log = CallLog(model)
    workload.run(0, {"model": log})
    return export_model(model, log.calls, find(model, log.calls, wanted))


def test_the_axes_are_those_of_the_latents_and_what_is_as_long() -> None:
    sizes = opened(Latents(), given(), "batch", "resolution").sizes
    assert sizes is not None
    assert sizes.axes == {
        "x": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}, "text": {0: "batch"},
    }  # fmt: skip
    assert sizes.ranges["height"] == Range(4, 16, 4)
    assert sizes.ranges["batch"] == Range(1, 8)
    assert (sizes.example["batch"], sizes.recorded["batch"]) == (2, 1)
    tokens = opened(Packed(), packed(), "resolution").sizes
    assert tokens is not None
    assert tokens.axes == {"hidden": {1: "tokens"}, "ids": {0: "tokens"}}


def test_a_range_ends_where_the_graph_does() -> None:
    """The table has 32 rows of patches, so latents have at most 64."""
    sizes = opened(Latents(), given(height=48), "resolution").sizes
    assert sizes is not None
    assert sizes.ranges["height"] == Range(24, 64, 8)
    assert sizes.ranges["width"] == Range(4, 24, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (Fixed(), {"x": given()["x"], "timestep": torch.ones(1)}),
         r"^(x: torch.export fixes axis 3 \(width\) to 12|the graph holds for width 12 only)"),
        (lambda: (nn.Linear(4, 4), {"input": torch.ones(2, 4)}), "no input has three axes"),
    ],
)  # fmt: skip
def test_what_is_a_number_to_the_model_is_refused_by_name(
    build: Callable[[], Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        opened(*build(), "resolution")


def test_requests_are_read_and_checked() -> None:
    assert parse("resolution, batch,batch") == ("resolution", "batch")
    with pytest.raises(EngineError, match="--dynamic: expected batch, resolution or both, got 'f"):
        parse("batch,frames")


def test_other_sizes_keep_the_order_in_memory() -> None:
    spec = TensorSpec(shape=(2, 3, 4), stride=(12, 1, 3), dtype="float32")
    assert spec.of_shape((5, 3, 7)).stride == (21, 1, 3)
    plain = TensorSpec(shape=(2, 1, 4), stride=(4, 4, 1), dtype="float32")
    assert plain.of_shape((3, 1, 6)).stride == (6, 6, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("open") / "engine"
    workload = workload_of(Latents(), given())
    report = export(workload, path, format="onnx", dynamic=("batch", "resolution"))
    assert report.engine_error < 1e-6
    return path


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 12), (8, 4, 24), (3, 16, 4)])
def test_an_engine_runs_at_every_size_of_its_ranges(
    folder: Path, batch: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    model = Latents().eval()
    call = given(batch, height, width)
    call["x"] = call["x"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with torch.no_grad():
        assert worst_error(Engine.load(folder)(**call), model(**call)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 9}, r"^x: axis 0 \(batch\) takes 1 to 8, got 9"),
        ({"height": 10}, r"^x: axis 2 \(height\) takes 4 to 16 in steps of 4, got 10"),
        ({"width": 28}, r"^x: axis 3 \(width\) takes 4 to 24 in steps of 4, got 28"),
        ({"text": torch.zeros(2, 5, 8)}, r"^text: axis 0 \(batch\) has 2, and x has 1"),
        ({"text": torch.zeros(1, 6, 8)}, r"^text: .*float32\[1, 5, 8\].*got float32\[1, 6, 8\]"),
        ({"x": torch.zeros(3, 8, 12)}, r"^x: .*got float32\[3, 8, 12\]"),
    ],
)
def test_sizes_outside_are_refused_by_name(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    sizes = {k: v for k, v in change.items() if isinstance(v, int)}
    call = {**given(**sizes), **{k: v for k, v in change.items() if isinstance(v, Tensor)}}
    with pytest.raises(EngineError, match=message):
        Engine.load(folder)(**call)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda call: call["sizes"].pop("batch"), r"^call.inputs.0.axes: .*no size 'batch'"),
        (lambda call: call["inputs"][0]["axes"].append([9, "batch"]), "there is no axis 9"),
        (lambda call: call["sizes"]["batch"].update(least=0), "^call.sizes.batch.least: "),
        (lambda call: call["sizes"]["height"].update(least=5), r"8 on axis 2 is none of call\.si"),
        (lambda call: call["sizes"]["height"].update(step=2**70), "^call.sizes.height.step: "),
    ],
)
def test_edited_ranges_are_refused_by_name(
    folder: Path, edit: Callable[[Any], None], message: str
) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    edit(document["call"])
    with pytest.raises(EngineError, match=message):
        Manifest.from_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_8_bit_layers_go_with_open_sizes(format: str, tmp_path: Path) -> None:
    """Scales belong to rows, so a plan that names formats alone needs no size."""
    torch.manual_seed(0)
    model = Latents().eval().requires_grad_(False)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend="ditopt_eager")(**given())
    graph = compiled_graphs(model)[-1]
    torch.compiler.reset()
    layer = [site for site in graph.linear if site.id == "layer"]
    plan = uniform_plan(model, graph, LinearRule(format="int8_row"), layer, calls=2)
    workload = workload_of(model, given())
    report = export(
        workload, tmp_path / "engine", plan, format=format, dynamic=("batch", "resolution")
    )
    assert report.engine_error < 1e-5
    engine = Engine.load(tmp_path / "engine")
    for size in ((1, 8, 12), (3, 16, 24), (8, 4, 4)):
        call = given(*size)
        assert 1e-4 < worst_error(engine(**call), model(**call)) < 0.02
