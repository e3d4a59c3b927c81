"""Published architectures as engines with open sizes, run at others than those of the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.errors import EngineError
from ditopt.export.engine import Engine
from ditopt.export.run import export
from ditopt.export.verify import relative_error
from ditopt.workload import Workload

from .models import build, first_tensor, kwargs_for

pytestmark = [pytest.mark.zoo, pytest.mark.slow]

AT_EXPORT = (8, 12)
FURTHER = [(1, (8, 8)), (3, (12, 12)), (2, (16, 8))]
"""Batch, and height and width of the latent."""


def workload_of(model: torch.nn.Module, name: str, hw: Any) -> Workload:
    def loop(stand_in: Any, seed: int) -> Tensor:
        calls = (stand_in(**kwargs_for(name, t=t, seed=seed, hw=hw)) for t in (700.0, 300.0))
        return torch.stack([first_tensor(result).clone() for result in calls])

    return Workload(model, loop)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_engines_run_at_sizes_other_than_exported(name: str, format: str, tmp_path: Path) -> None:
    """Image, packed tokens with position ids, video."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, _ = build(name)
    workload = workload_of(model, name, AT_EXPORT)
    report = export(workload, tmp_path / "engine", format=format, dynamic=("batch", "resolution"))
    assert report.engine_error < 1e-5
    engine = Engine.load(tmp_path / "engine")
    for batch, hw in FURTHER:
        given = kwargs_for(name, batch=batch, hw=hw)
        with torch.no_grad():
            expected = first_tensor(model(**given))
            assert relative_error(first_tensor(engine(**given)), expected) < 1e-5
    with pytest.raises(EngineError, match=r"^hidden_states: axis 0 \(batch\) takes 1 to 8, got 9"):
        engine(**kwargs_for(name, batch=9, hw=AT_EXPORT))


@pytest.mark.parametrize(
    ("name", "hw", "reason"),
    [
        ("dit", (8, 8), r"the graph holds for (height|width) 8 only: it wants "),
        ("pixart", (8, 8), r"the graph holds for (height|width) 8 only: it wants "),
    ],
)
def test_a_model_of_one_resolution_says_so(name: str, hw: Any, reason: str, tmp_path: Path) -> None:
    """DiT takes the root of the token count; PixArt has a table for its own size."""
    model, _ = build(name)
    with pytest.raises(EngineError, match=reason):
        export(
            workload_of(model, name, hw), tmp_path / "engine", format="pt2",
            dynamic=("resolution",),
        )  # fmt: skip
    assert not (tmp_path / "engine").exists()
