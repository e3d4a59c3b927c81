"""The ordered passes, and the one runner that verifies, times, dumps, disables and bisects them.

This is the only core module that names concrete passes and backends.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ditopt.backends.aoti import AotiExporter
from ditopt.backends.eager import EagerBackend
from ditopt.backends.inductor import InductorBackend
from ditopt.backends.onnx import OnnxExporter
from ditopt.backends.tensorrt import TensorRTExporter
from ditopt.errors import BackendUnavailable, CaptureError, ConfigError, did_you_mean
from ditopt.files import write_text
from ditopt.graph import fake_value, output_nodes, placeholders, readable, verify
from ditopt.passes.fuse_heads import FuseHeads
from ditopt.passes.fuse_projections import FuseProjections
from ditopt.passes.linearize_attention import LinearizeAttention
from ditopt.passes.quantize_attention import QuantizeAttention
from ditopt.passes.quantize_linears import QuantizeLinears
from ditopt.passes.reorder_tokens import ReorderTokens
from ditopt.passes.search_hierarchically import SearchHierarchically
from ditopt.passes.select_blocks_online import SelectBlocksOnline
from ditopt.passes.select_head_orders import SelectHeadOrders
from ditopt.passes.select_sparse_pattern import SelectSparsePattern
from ditopt.passes.substitute_means import SubstituteMeans
from ditopt.symbols import hint, is_symbolic

if TYPE_CHECKING:
    from ditopt.backends.base import Backend, Exporter
    from ditopt.config import Options
    from ditopt.passes.base import NodeDecision, Pass, PassContext

log = logging.getLogger(__name__)

PIPELINE: tuple[Pass, ...] = (
    FuseProjections(),
    QuantizeLinears(),
    ReorderTokens(),
    SelectSparsePattern(),
    FuseHeads(),
    SelectBlocksOnline(),
    SelectHeadOrders(),
    SearchHierarchically(),
    LinearizeAttention(),
    SubstituteMeans(),
    QuantizeAttention(),
)

BACKENDS: dict[str, Backend] = {"eager": EagerBackend(), "inductor": InductorBackend()}
EXPORTERS: dict[str, Exporter] = {
    "pt2": AotiExporter(),
    "onnx": OnnxExporter(),
    "tensorrt": TensorRTExporter(),
}


def exporter(name: str) -> Exporter:
    """The exporter of an engine format.

    Raises:
        ConfigError: an unknown format.
        BackendUnavailable: it needs something that is not installed.
    """
    if name not in EXPORTERS:
        raise ConfigError(f"unknown format {name!r}", remedy=did_you_mean(name, EXPORTERS))
    reason = EXPORTERS[name].available()
    if reason is not None:
        raise BackendUnavailable(reason)
    return EXPORTERS[name]


class PassRunner:
    """Runs the pipeline over the bodies of one compilation, which share fuel and dump numbers."""

    def __init__(self, options: Options, passes: Sequence[Pass] = PIPELINE) -> None:
        check_order(passes)
        known = [p.name for p in passes]
        for name in (*options.disable, *([options.stop_after] if options.stop_after else [])):
            if name not in known:
                raise ConfigError(f"unknown pass {name!r}", remedy=did_you_mean(name, known))
        self.options = options
        self.passes = _chosen(passes, options)
        self.fuel = options.fuel
        self.elapsed_ms: dict[str, float] = {}
        self._dumped = 0

    def run(
        self, gm: fx.GraphModule, ctx: PassContext, where: str
    ) -> list[tuple[str, NodeDecision]]:
        """Rewrite `gm` in place.

        Returns:
            (pass name, decision) in order.

        Raises:
            CaptureError: a pass broke the graph, changed what it returns, or lied about having
                changed it.
        """
        expected = [_signature(value) for value in output_nodes(gm)]
        decisions: list[tuple[str, NodeDecision]] = []
        for step in self.passes:
            if self.fuel is not None and self.fuel <= 0:
                break
            before = gm.code
            picture = readable(gm) if self.options.dump else ""
            started = time.perf_counter()
            made = step.run(gm, ctx)
            gm.recompile()
            self.elapsed_ms[step.name] = self.elapsed_ms.get(step.name, 0.0) + 1e3 * (
                time.perf_counter() - started
            )
            applied = sum(decision.applied for decision in made)
            if bool(applied) != (gm.code != before):
                raise CaptureError(
                    f"pass {step.name} on {where}: "
                    "its decisions do not match what it did to the graph"
                )
            if applied:
                _settle(gm, expected, f"pass {step.name} on {where}")
            if self.fuel is not None:
                self.fuel -= applied
            if self.options.dump:
                self._dump(step.name, where, picture, readable(gm), made)
            log.debug(
                "%s on %s: %d applied, %d not", step.name, where, applied, len(made) - applied
            )
            decisions += [(step.name, decision) for decision in made]
        return decisions

    def _dump(
        self, name: str, where: str, before: str, after: str, made: Sequence[NodeDecision]
    ) -> None:
        folder = Path(self.options.dump or ".")
        stem = f"{self._dumped:03d}_{where}_{name}"
        self._dumped += 1
        write_text(folder / f"{stem}.before.py", before)
        write_text(folder / f"{stem}.after.py", after)
        write_text(folder / f"{stem}.decisions.json", json.dumps([vars(d) for d in made], indent=1))


def check_order(passes: Sequence[Pass]) -> None:
    """Refuse a pipeline in which a pass precedes one that it must follow; lists all violations."""
    seen: set[str] = set()
    names = {step.name for step in passes}
    wrong = []
    for step in passes:
        wrong += [
            f"{step.name} must come after {other}" for other in sorted((step.after & names) - seen)
        ]
        seen.add(step.name)
    if wrong:
        raise ConfigError("; ".join(wrong), remedy="Reorder PIPELINE in ditopt/pipeline.py.")


def _chosen(passes: Sequence[Pass], options: Options) -> list[Pass]:
    chosen = []
    for step in passes:
        if step.name not in options.disable:
            chosen.append(step)
        if step.name == options.stop_after:
            break
    return chosen


def _signature(node: Any) -> tuple[Any, ...] | None:
    value = fake_value(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    return (tuple(value.shape), tuple(value.stride()), value.dtype)


def _settle(gm: fx.GraphModule, expected: Sequence[tuple[Any, ...] | None], where: str) -> None:
    """Recompute fake values after a rewrite and hold the outputs to what they were.

    The next piece was captured with these shapes and strides, so an output whose strides changed is
    copied back into place.
    """
    from torch._guards import detect_fake_mode

    examples = [fake_value(node) for node in placeholders(gm)]
    mode = detect_fake_mode(examples)
    specs = {node.name: node.meta.get("ditopt") for node in placeholders(gm)}
    _propagate(gm, mode, examples)
    for node in placeholders(gm):
        if specs[node.name] is not None:
            node.meta["ditopt"] = specs[node.name]
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    results = list(output_nodes(gm))
    changed = False
    for k, (node, wanted) in enumerate(zip(results, expected, strict=True)):
        got = _signature(node)
        if got == wanted or wanted is None:
            continue
        if got is None or (got[0], got[2]) != (wanted[0], wanted[2]):
            raise CaptureError(f"{where} changed output {k} from {wanted} to {got}")
        with gm.graph.inserting_before(output):
            results[k] = _restrided(gm.graph, node, wanted)
        changed = True
    if changed:
        output.args = (tuple(results),)
        _propagate(gm, mode, examples)
    gm.recompile()
    verify(gm, where)


def _propagate(gm: fx.GraphModule, mode: Any, examples: Sequence[Any]) -> None:
    """Fill in fake values.

    Some composite operators (`aten.pad`) read sizes as integers in C++, which guards on them and so
    makes Dynamo compile every resolution anew; under the Python dispatcher they keep symbols.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with torch.no_grad(), enable_python_dispatcher():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*examples)


def _restrided(graph: fx.Graph, node: fx.Node, wanted: tuple[Any, ...]) -> fx.Node:
    value = fake_value(node)
    sizes, strides, _ = wanted
    aten = torch.ops.aten
    if any(is_symbolic(size) for size in (*sizes, *strides)):
        # A symbol cannot be written into a graph: copy densely, in the order of the strides.
        order = sorted(range(len(sizes)), key=lambda axis: -hint(strides[axis]))
        inverse = [order.index(axis) for axis in range(len(sizes))]
        ordered = graph.call_function(aten.permute.default, (node, order))
        memory: dict[str, Any] = {"memory_format": torch.contiguous_format}
        dense = graph.call_function(aten.clone.default, (ordered,), memory)
        return graph.call_function(aten.permute.default, (dense, inverse))
    empty = graph.call_function(
        aten.empty_strided.default,
        (list(sizes), list(strides)),
        {"dtype": value.dtype, "device": value.device},
    )
    return graph.call_function(aten.copy.default, (empty, node))
