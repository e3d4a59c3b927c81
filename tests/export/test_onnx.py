"""ONNX: rewrites against the graphs they stand for, and files that onnxruntime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditopt.backends.onnx import OnnxExporter
from ditopt.backends.onnx_rewrites import Pair, Rewriting
from ditopt.backends.tensorrt import undocumented_operators
from ditopt.errors import EngineError
from ditopt.export.native import load_native
from ditopt.kernels.block_sparse_attention import ops, reference  # noqa: F401  (ops registers the operator)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def graph_of(module: nn.Module, *args: Tensor) -> torch.fx.GraphModule:
    """Functional ATen with the module's buffers as attributes, as the exporter hands it over."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), args).run_decompositions({})
    gm = program.module()
    graph = torch.fx.Graph()
    returned = graph.graph_copy(gm.graph, {})
    for node in list(graph.nodes):
        if "guards" in str(node.target) and not node.users:
            graph.erase_node(node)
    graph.output(tuple(returned))
    plain = torch.fx.GraphModule(gm, graph)
    for node, value in zip([n for n in graph.nodes if n.op == "placeholder"], args, strict=True):
        node.meta["val"] = value
    return plain


class ComplexRope(nn.Module):
    """As Qwen-Image and Lumina write it."""

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        """[B, N, D], [N, D / 2] -> [B, N, D]."""
        turn = torch.polar(torch.ones_like(angle), angle)
        turn = torch.cat(list(turn.split([2, 1], dim=0)), dim=0)[None]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)


class TruthValues(nn.Module):
    """Masks that are computed with masks."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """[N], [N] -> [N]."""
        both = torch.where(x > 0, keep, ~keep).masked_fill(x > 1, True).masked_fill(x < -1, False)
        return torch.where(both, x, torch.zeros_like(x))


class KeyMask(nn.Module):
    """A mask row for all queries, and a squeeze that does nothing."""

    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        """[B, H, N, D], [B, 1, 1, N] -> [B, H, N, D]."""
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask.squeeze(0)).squeeze(1)


class NoKeys(nn.Module):
    """Cross-attention to a prompt that an image has crowded out."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, N, D], [B, H, 0, D] -> [B, H, N, D]."""
        return q + F.scaled_dot_product_attention(q, k, k)


CASES: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
    (ComplexRope(), (torch.randn(2, 3, 8), torch.randn(3, 4))),
    (TruthValues(), (torch.randn(64) * 2, torch.rand(64) > 0.5)),
    (NoKeys(), (torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8))),
    (KeyMask(), (torch.randn(2, 2, 5, 8), torch.rand(2, 1, 1, 5) > 0.3)),
]


@pytest.mark.parametrize(("module", "args"), CASES, ids=lambda x: type(x).__name__)
def test_rewritten_graphs_compute_the_same(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    result = Rewriting(graph_of(module, *args), {}).run(*args)[0]
    torch.testing.assert_close(result, module(*args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "args", "opset"),
    [*((*case, 18) for case in CASES), (*CASES[-1], 23)],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_onnxruntime_computes_the_same(
    tmp_path: Path, module: nn.Module, args: tuple[Tensor, ...], opset: int
) -> None:
    path = tmp_path / "model.onnx"
    assert OnnxExporter().export(graph_of(module, *args), path, {"opset": opset}) == []
    (result,) = load_native(path)(list(args))
    torch.testing.assert_close(result, module(*args), rtol=1e-5, atol=1e-6)
    model = onnx.load(str(path))
    assert model.opset_import[0].version == opset
    has_attention = any(node.op_type == "Attention" for node in model.graph.node)
    assert has_attention == (opset == 23 and isinstance(module, KeyMask))
    if opset == 18:
        assert undocumented_operators(path) == []


@pytest.mark.parametrize(("tokens", "block"), [(16, 4), (19, 8), (7, 16)])
def test_lists_of_blocks_become_a_mask(tokens: int, block: int) -> None:
    """Odd sizes, an empty row and a row that keeps everything, against the specification."""
    q, k, v = (torch.randn(1, 2, tokens, 8, dtype=torch.float64) for _ in range(3))
    rows = -(-tokens // block)
    generator = torch.Generator().manual_seed(tokens)
    counts = torch.randint(0, rows + 1, (1, 2, rows), generator=generator, dtype=torch.int32)
    counts[0, 0, 0], counts[0, 1, 0] = 0, rows
    ids = torch.arange(rows, dtype=torch.int32).expand(1, 2, rows, rows).contiguous()
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("q", "k", "v", "counts", "ids")]
    out = graph.call_function(
        torch.ops.ditopt.block_sparse_attention.default, (*inputs, block, block, 0.3)
    )
    graph.output((out,))
    (result,) = Rewriting(torch.fx.GraphModule({}, graph), {}).run(q, k, v, counts, ids)
    expected = reference.block_sparse_attention(
        q, k, v, counts, ids, block_q=block, block_k=block, scale=0.3
    )
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_what_has_no_counterpart_is_named() -> None:
    graph = torch.fx.Graph()
    z = graph.placeholder("z")
    graph.output((graph.call_function(torch.ops.aten.fft_fft.default, (z,)),))
    pair = Pair(torch.ones(2), torch.ones(2))
    with pytest.raises(EngineError, match=r"aten\.fft_fft\.default on complex numbers"):
        Rewriting(torch.fx.GraphModule({}, graph), {}).run(pair)
    with pytest.raises(EngineError, match="opset 9 is too old, the lowest is 18"):
        OnnxExporter().export(torch.fx.GraphModule({}, graph), Path("x.onnx"), {"opset": 9})


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditopt.backends import onnx as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else 1)
    reason: Any = OnnxExporter().available()
    assert "onnxscript" in reason
    assert "ditopt[onnx]" in reason
    assert "onnxruntime" not in reason
