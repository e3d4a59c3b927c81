"""Which node the lowering puts in the place of an attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from ditopt.backends import inductor
from ditopt.kernels.block_sparse_attention import cpu_native, dispatch, flex
from ditopt.kernels.block_sparse_attention import fa4 as fa4  # registers the operator
from ditopt.kernels.block_sparse_attention import ops as ops
from ditopt.passes.base import EXECUTOR
from ditopt.sites import SDPA

SPARSE = torch.ops.ditopt.block_sparse_attention.default
FA4 = torch.ops.ditopt.block_sparse_attention_fa4.default


def lowered(target: Any, *further: Any, meta: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The target of one attention node after the executors were put in."""
    graph = fx.Graph()
    values = [torch.empty(1, 2, 1024, 64) for _ in "qkv"]
    inputs = [graph.placeholder(name) for name in "qkv"]
    for node, value in zip(inputs, values, strict=True):
        node.meta["val"] = value
    if target is SPARSE:
        inputs += [graph.placeholder(name) for name in ("counts", "ids")]
    node = graph.call_function(target, (*inputs, *further), kwargs)
    node.meta = {"val": values[0], **(meta or {})}
    graph.output((node,))
    gm = fx.GraphModule({}, graph)
    inductor._use_executors(gm)
    (found,) = (n for n in gm.graph.nodes if n.op == "call_function")
    return found


@pytest.mark.parametrize(
    ("executor", "target"),
    [("flex", flex.block_sparse_attention), ("fa4", FA4), ("gluon", SPARSE), ("cpu", SPARSE)],
)
def test_the_chosen_executor_stands_in_the_graph(executor: str, target: Any) -> None:
    node = lowered(SPARSE, 128, 128, 0.125, meta={EXECUTOR: executor})
    assert node.target is target
    assert node.args[5:] == (128, 128, 0.125)


def test_without_a_choice_the_shape_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    declined = dispatch.reasons_to_decline(torch.zeros(1, 2, 1024, 64), 128, 128)
    target = flex.block_sparse_attention if "cpu" in declined else SPARSE
    assert lowered(SPARSE, 128, 128, 0.125).target is target
    monkeypatch.setattr(cpu_native, "reason_to_decline", lambda q: "no compiler")
    assert lowered(SPARSE, 128, 128, 0.125).target is flex.block_sparse_attention


@pytest.fixture
def with_fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which FlashAttention-4 is installed and faster."""
    base = {"block": [128, 128], "channels": 64, "processors": 1, "host": 1.0, "start": 1.0}
    costs = tuple(
        {**base, "executor": name, "tile": 0.0, "entry": entry}
        for name, entry in (("sdpa", 2.0), ("fa4_dense", 1.0))
    )
    monkeypatch.setattr(dispatch, "costs_of", lambda device: costs)
    monkeypatch.setattr(dispatch, "reasons_to_decline", lambda *args: {})


@pytest.mark.usefixtures("with_fa4")
def test_dense_attention_goes_to_the_faster_kernel() -> None:
    node = lowered(SDPA, scale=0.5)
    assert node.target is torch.ops.ditopt.attention_fa4.default
    assert node.args[3] == 0.5
    assert lowered(SDPA).args[3] == 64**-0.5


@pytest.mark.usefixtures("with_fa4")
@pytest.mark.parametrize(
    "arguments", [(None, 0.0, True), (torch.zeros(1024, 1024),), (None, 0.1)], ids=str
)
def test_masks_and_dropout_stay(arguments: tuple[Any, ...]) -> None:
    assert lowered(SDPA, *arguments).target is SDPA


def test_without_flash_attention_4_nothing_changes() -> None:
    assert lowered(SDPA).target is SDPA
