"""Write a graph as an ONNX model that onnx.checker and onnxruntime accept.

From opset 23 on attention stays one `Attention` node and RMS norm one `RMSNormalization`, which
runtimes have fast kernels for; a lower opset writes them out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ditopt.backends.examples import examples_of
from ditopt.backends.onnx_blocks import gather_blocks
from ditopt.backends.onnx_pairs import write_pairs
from ditopt.backends.onnx_rewrites import Pair, Rewriting
from ditopt.errors import EngineError
from ditopt.graph import placeholders

OPSET = 23
"""The first one with Attention and RMSNormalization."""

LOWEST_OPSET = 18

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class OnnxExporter:
    """ONNX models, their weights in a file beside them."""

    format = "onnx"
    suffix = ".onnx"
    holds_weights = True
    keeps_strides = False

    def available(self) -> str | None:
        """None when the three packages are installed."""
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if not missing:
            return None
        return f"ONNX needs {', '.join(missing)}: pip install 'ditopt[onnx]'"

    def export(self, gm: fx.GraphModule, path: Path, options: Mapping[str, Any]) -> list[str]:
        """Write `gm`, whose attributes are the weights, and check the file; it changes `gm`.

        Args:
            gm: its placeholders are the model's inputs, tensors alone; sizes may be symbols.
            path: file to write; weights go to `<path>.data`.
            options: `opset`.

        Raises:
            EngineError: something has no counterpart in ONNX, or the checker refuses the file.
        """
        opset = int(options.get("opset", OPSET))
        if opset < LOWEST_OPSET:
            raise EngineError(f"opset {opset} is too old, the lowest is {LOWEST_OPSET}")
        notes = _prepare(gm, opset)
        examples, axes = examples_of(gm)
        names = [node.name for node in placeholders(gm)]
        with torch.no_grad(), _quietly():
            program = torch.export.export(_Rewritten(gm), examples, dynamic_shapes=axes)
            torch.onnx.export(
                program, f=str(path), dynamo=True, opset_version=opset, external_data=True,
                input_names=names, verbose=False,
            )  # fmt: skip
        _check(path)
        return notes


def _prepare(gm: fx.GraphModule, opset: int) -> list[str]:
    """Rewrites that need the graph and its constants; returns what the report is to say."""
    for node in gm.graph.nodes:
        if str(node.target).startswith("ditopt.block_sparse_attention_8bit"):
            raise EngineError(
                f"the operator {node.target} has no counterpart in ONNX",
                remedy="Leave `arithmetic` out of the plan, or use torch.compile.",
            )
    gathered, masked = gather_blocks(gm)
    pairs = write_pairs(gm, opset)
    told = (
        (gathered, "block-sparse attentions became dense ones on gathered tokens: exact"),
        (masked, "block-sparse attentions became masks: exact, but as slow as dense"),
        (pairs, "8-bit layers became QuantizeLinear/DequantizeLinear pairs, one scale per token"),
    )
    gm.recompile()
    return [f"{count} {text}" for count, text in told if count]


class _Rewritten(nn.Module):
    """A graph with `onnx_rewrites` applied; complex weights are kept as real pairs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self._gm = gm
        self._complex: list[tuple[str, str]] = []
        for name, value in list(gm.named_buffers()):
            if value.is_complex():
                own = f"pair_{len(self._complex)}"
                self.register_buffer(own, torch.view_as_real(value).clone())
                self._complex.append((name, own))
        for name, _ in self._complex:
            delattr(gm, name)

    def forward(self, *args: Tensor) -> Any:
        pairs = {}
        for name, own in self._complex:
            both = getattr(self, own)
            pairs[name] = Pair(both[..., 0], both[..., 1])
        return Rewriting(self._gm, pairs).run(*args)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        lines = str(error).strip().splitlines()
        raise EngineError(f"onnx.checker refuses {path.name}: {lines[0]}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch.onnx tells its progress on standard output, where JSON may go."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
