"""TensorRT programs through torch-tensorrt, and what TensorRT's ONNX parser is known to take.

Not run so far: TensorRT's libraries were not available where this was written. The calls follow
torch-tensorrt's documented interface (`dynamo.compile`, `save`), and the tests check them against a
stand-in. Where torch-tensorrt is missing, `--format onnx --opset 18` and `trtexec` do the same job.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ditopt.backends.onnx_rewrites import Rewriting
from ditopt.errors import EngineError
from ditopt.graph import fake_value, placeholders

_INSTEAD = (
    "Export with --format onnx --opset 18 and build that: trtexec --onnx=... --saveEngine=... "
    "Or install it: pip install 'ditopt[tensorrt]', with TensorRT's libraries."
)

# The operators marked as supported in onnx-tensorrt's docs/operators.md (commit 009d654, TensorRT
# 8.4) that a DiT can contain. Later versions take more.
DOCUMENTED = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "Cos", "CumSum", "DequantizeLinear", "Div", "Einsum", "Equal", "Erf", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm", "Greater",
    "GreaterOrEqual", "Identity", "If", "IsNaN", "Less", "LessOrEqual", "Log", "MatMul", "Max",
    "Min", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "QuantizeLinear", "Range", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Round",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Slice", "Softmax",
    "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose",
    "Unsqueeze", "Where", "Xor",
})  # fmt: skip


class TensorRTExporter:
    """TensorRT engines inside exported programs."""

    format = "tensorrt"
    suffix = ".ep"
    holds_weights = True
    keeps_strides = False

    def available(self) -> str | None:
        """None when torch-tensorrt can be imported and there is a GPU."""
        try:
            import torch_tensorrt  # noqa: F401
        except Exception as error:  # a bare Exception where TensorRT's libraries are missing
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"torch_tensorrt cannot be imported ({cause}). {_INSTEAD}"
        if not torch.cuda.is_available():
            return f"TensorRT needs a CUDA device, and there is none. {_INSTEAD}"
        return None

    def export(self, gm: fx.GraphModule, path: Path, options: Mapping[str, Any]) -> list[str]:
        """Build a TensorRT engine of the whole of `gm` and write it.

        Raises:
            EngineError: an operator that TensorRT does not take.
        """
        import torch_tensorrt

        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        specs = [fake_value(node) for node in placeholders(gm)]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FakeTensorMode(allow_non_fake_inputs=True):
                fakes = tuple(
                    torch.empty(tuple(v.shape), dtype=v.dtype, device=v.device) for v in specs
                )
            program = torch.export.export(_Real(gm), fakes)
            inputs = [torch_tensorrt.Input(shape=tuple(v.shape), dtype=v.dtype) for v in specs]
            try:
                compiled = torch_tensorrt.dynamo.compile(
                    program, arg_inputs=inputs, require_full_compilation=True, **options
                )
            except Exception as error:  # torch-tensorrt has no exception type of its own
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise EngineError(f"TensorRT refuses the model: {lines[0]}") from error
            torch_tensorrt.save(
                compiled, str(path), output_format="exported_program", arg_inputs=inputs
            )
        return []


class _Real(torch.nn.Module):
    """The graph without what neither ONNX nor TensorRT has: complex numbers, block lists."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self._gm = gm

    def forward(self, *args: Any) -> Any:
        return Rewriting(self._gm, {}).run(*args)


def undocumented_operators(path: Path) -> list[str]:
    """Operators of an ONNX model that are not in TensorRT's list as quoted above."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    names = {node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
             for node in model.graph.node}  # fmt: skip
    return sorted(names - DOCUMENTED)
