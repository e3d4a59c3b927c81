"""Plans in ONNX: 8-bit layers as pairs of nodes, block lists as gathered tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from ditopt.backends.onnx import OnnxExporter
from ditopt.backends.onnx_blocks import MOST_BATCHES, gather_blocks
from ditopt.backends.onnx_pairs import write_pairs
from ditopt.errors import EngineError
from ditopt.export.native import load_native
from ditopt.kernels.block_sparse_attention import ops, reference  # noqa: F401  (ops registers it)
from ditopt.quantization.rowwise import FP8_ROW, INT8_ROW, RowFormat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def layer_graph(
    form: RowFormat, x: Tensor, weight: Tensor, bias: Tensor | None, native: bool
) -> Any:
    """One 8-bit layer as the pass writes it, its operands attributes."""
    root, graph = torch.nn.Module(), fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given_x = graph.placeholder("x")
    given_x.meta["val"] = x
    parts = {}
    operands = {**form.encode(weight), **({} if bias is None else {"bias": bias})}
    for name, value in operands.items():
        root.register_buffer(name, value)
        node = graph.get_attr(name)
        node.meta["val"] = value
        parts[name] = fx.Proxy(node, tracer)
    y = form.multiply(fx.Proxy(given_x, tracer), parts, parts.get("bias"), x.dtype, native=native)
    graph.output((y.node,))
    return fx.GraphModule(root, graph)


def nodes_of(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


@pytest.mark.parametrize(
    ("form", "native", "rows", "n", "k", "biased", "opset"),
    [
        (INT8_ROW, True, 33, 24, 40, True, 23),
        (INT8_ROW, True, 1, 7, 3, False, 18),
        (INT8_ROW, False, 16, 8, 8, True, 21),
        (FP8_ROW, False, 33, 24, 40, True, 23),
        (FP8_ROW, False, 5, 16, 16, False, 19),
    ],
)
def test_an_8_bit_layer_becomes_pairs(
    tmp_path: Path,
    form: RowFormat,
    native: bool,
    rows: int,
    n: int,
    k: int,
    biased: bool,
    opset: int,
) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, k) * torch.logspace(-3, 2, rows)[:, None], torch.randn(n, k)
    bias = torch.randn(n) if biased else None
    gm = layer_graph(form, x, weight, bias, native)
    expected = gm(x)[0]
    path = tmp_path / "layer.onnx"
    (note,) = OnnxExporter().export(gm, path, {"opset": opset})
    assert note.startswith("1 8-bit layers became QuantizeLinear/DequantizeLinear pairs")
    (result,) = load_native(path)([x])
    # A number may fall to the other side of a tie: one step of one element of a row.
    error = (result - expected).norm() / expected.norm()
    assert error < 2e-5
    found = nodes_of(path)
    assert (found.count("QuantizeLinear"), found.count("DequantizeLinear")) == (1, 2)
    stored = {t.name: t.data_type for t in onnx.load(str(path)).graph.initializer}
    wanted = onnx.TensorProto.INT8 if form is INT8_ROW else onnx.TensorProto.FLOAT8E4M3FN
    assert wanted in stored.values()


def test_the_gpu_s_fp8_product_becomes_pairs_too() -> None:
    """`_scaled_mm` runs on a CPU as well; what is matched is the form that the pass writes."""
    x, weight, bias = torch.randn(4, 32), torch.randn(16, 32), torch.randn(16)
    gm = layer_graph(FP8_ROW, x, weight, bias, native=True)
    targets = [str(node.target) for node in gm.graph.nodes]
    assert "aten._scaled_mm.default" in targets
    assert write_pairs(gm, 23) == 1
    targets = [str(node.target) for node in gm.graph.nodes]
    assert not any("_scaled_mm" in name for name in targets)
    assert sum("product" in name for name in targets) == 1


def test_what_cannot_be_pairs_is_refused() -> None:
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    with pytest.raises(EngineError, match="8-bit floats need opset 19, and 18 was asked for"):
        write_pairs(layer_graph(FP8_ROW, x, weight, None, native=False), 18)
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(torch.ops.aten._int_mm.default, (a, b)),))
    with pytest.raises(EngineError, match=r"aten\._int_mm\.default stands in a form"):
        write_pairs(fx.GraphModule({}, graph), 23)


def attention_graph(
    counts: Tensor, ids: Tensor, q: Tensor, k: Tensor, block: tuple[int, int]
) -> Any:
    root, graph = torch.nn.Module(), fx.Graph()
    operands = []
    for name, value in (("q", q), ("k", k), ("v", k)):
        operands.append(graph.placeholder(name))
        operands[-1].meta["val"] = value
    for name, value in (("counts", counts), ("ids", ids)):
        root.register_buffer(name, value)
        operands.append(graph.get_attr(name))
    out = graph.call_function(
        torch.ops.ditopt.block_sparse_attention.default, (*operands, *block, 0.3)
    )
    out.meta["val"] = q
    graph.output((out,))
    return fx.GraphModule(root, graph)


def lists_of(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ids of the blocks in masks [H, QB, KB]."""
    order = torch.argsort(~masks, dim=-1, stable=True)
    counts = masks.sum(-1)
    ids = torch.where(torch.arange(masks.shape[-1]) < counts[..., None], order, 0)
    return counts.int()[None], ids.int()[None]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gathered_blocks_are_the_specification(data: st.DataObject) -> None:
    """Any lists of few different rows: odd sizes, rows without keys, heads alike or not."""
    tokens_q, tokens_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = (data.draw(st.sampled_from([4, 8, 16])), data.draw(st.sampled_from([4, 8])))
    rows, columns = -(-tokens_q // block[0]), -(-tokens_k // block[1])
    kinds = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=1, max_size=3
        )
    )
    chosen = st.lists(st.sampled_from(kinds), min_size=rows, max_size=rows)
    masks = torch.tensor(data.draw(st.lists(chosen, min_size=2, max_size=3)))
    heads = masks.shape[0]
    counts, ids = lists_of(masks)
    q = torch.randn(2, heads, tokens_q, 8, dtype=torch.float64)
    k = torch.randn(2, heads, tokens_k, 8, dtype=torch.float64)
    gm = attention_graph(counts, ids, q, k, block)
    assert gather_blocks(gm) == (1, 0)
    gm.recompile()
    expected = reference.block_sparse_attention(
        q, k, k, counts, ids, block_q=block[0], block_k=block[1], scale=0.3
    )
    torch.testing.assert_close(gm(q, k, k)[0], expected, rtol=1e-12, atol=1e-12)


def test_gathered_blocks_run_in_onnxruntime(tmp_path: Path) -> None:
    """Frames that see themselves: one batch of dense attention, no mask, no larger product."""
    masks = torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
    q, k = torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8)
    gm = attention_graph(*lists_of(masks), q, k, (8, 8))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.unflatten(2, (4, 8)) for x in (q, k, k)), scale=0.3
    ).flatten(2, 3)
    path = tmp_path / "frames.onnx"
    (note,) = OnnxExporter().export(gm, path, {})
    assert note == "1 block-sparse attentions became dense ones on gathered tokens: exact"
    (result,) = load_native(path)([q, k, k])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    found = nodes_of(path)
    assert found.count("Attention") == 1
    assert "Equal" not in found  # a mask would compare block numbers


def test_lists_that_are_computed_or_all_different_stay(tmp_path: Path) -> None:
    size = 2 * (MOST_BATCHES + 1)
    masks = torch.ones(1, size, size, dtype=torch.bool).tril()  # each row has another length
    q = torch.randn(1, 1, size, 4)
    gm = attention_graph(*lists_of(masks), q, q, (1, 1))
    assert gather_blocks(gm) == (0, 1)
    computed = attention_graph(*lists_of(masks[:, :2, :2]), q[:, :, :2], q[:, :, :2], (1, 1))
    counts = next(node for node in computed.graph.nodes if node.target == "counts")
    with computed.graph.inserting_before(counts):
        given_counts = computed.graph.placeholder("given")
    counts.replace_all_uses_with(given_counts)
    assert gather_blocks(computed) == (0, 1)
    path = tmp_path / "rows.onnx"
    (note,) = OnnxExporter().export(gm, path, {})
    assert note == "1 block-sparse attentions became masks: exact, but as slow as dense"
    (result,) = load_native(path)([q, q, q])
    causal = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)
    torch.testing.assert_close(result, causal, rtol=1e-5, atol=1e-6)
