"""Native programs in this process: loading them, and calling one with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditopt.errors import BackendUnavailable, EngineError
from ditopt.export.schema import Program, TensorSpec

if TYPE_CHECKING:
    from ditopt.export.wiring import Step

Native = Callable[[list[Tensor]], list[Tensor]]
"""A loaded program: arguments in order -> results in order."""


def load_native(path: Path) -> Native:
    """A program of AOTInductor, or an ONNX model in onnxruntime.

    Raises:
        EngineError: the runtime refuses the file.
        BackendUnavailable: onnxruntime is not installed.
    """
    if path.suffix == ".onnx":
        return _load_onnx(path)
    if path.suffix == ".ep":
        return _load_tensorrt(path)
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise EngineError(
            f"{path.name}: the runtime cannot load this program: {lines[0]}",
            remedy="Export the engine anew on this machine and with this version of torch.",
        ) from error
    run: Native = loader.boxed_run
    return run


def _load_onnx(path: Path) -> Native:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            "this engine runs in onnxruntime, which is not installed",
            remedy="pip install 'ditopt[onnx]'",
        ) from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception type per status code
        lines = str(error).strip().splitlines() or [""]
        raise EngineError(f"{path.name}: onnxruntime refuses this model: {lines[0]}") from error
    names = [item.name for item in session.get_inputs()]

    def run(arguments: list[Tensor]) -> list[Tensor]:
        fed = {n: a.contiguous().numpy() for n, a in zip(names, arguments, strict=True)}
        try:
            return [torch.from_numpy(value) for value in session.run(None, fed)]
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise EngineError(f"{path.name}: onnxruntime fails: {lines[0][:300]}") from error

    return run


def _load_tensorrt(path: Path) -> Native:
    try:
        import torch_tensorrt  # noqa: F401  (registers what the file holds)
    except Exception as error:  # it raises a bare Exception without TensorRT's libraries
        raise BackendUnavailable(
            f"this engine runs in TensorRT, and torch_tensorrt cannot be imported: {error}",
            remedy="pip install torch-tensorrt, with TensorRT's libraries.",
        ) from error
    program = torch.export.load(str(path)).module()

    def run(arguments: list[Tensor]) -> list[Tensor]:
        return list(program(*arguments))

    return run


def with_weights(
    native: Native, step: Step, tensors: Mapping[str, Tensor]
) -> tuple[Callable[..., list[Tensor]], tuple[int, ...]]:
    """A program with its weights in place.

    Returns:
        A function of the values in the step's slots, and these slots in order.
    """
    template = [tensors[item] if isinstance(item, str) else None for item in step.inputs]
    places = [k for k, item in enumerate(step.inputs) if isinstance(item, int)]
    slots = tuple(item for item in step.inputs if isinstance(item, int))

    def call(*values: Tensor) -> list[Tensor]:
        arguments: list[Any] = template.copy()
        for place, value in zip(places, values, strict=True):
            arguments[place] = value
        return native(arguments)

    return call, slots


def checked(native: Native, program: Program) -> Native:
    """The same, comparing what crosses its border with what the manifest says (for exporting).

    Raises:
        EngineError: a value has another size or stride than the program was compiled for.
    """

    def compare(kind: str, specs: Sequence[TensorSpec], values: Sequence[Tensor]) -> None:
        for position, (spec, value) in enumerate(zip(specs, values, strict=True)):
            found = TensorSpec.of(value)
            if not spec.alike(found):
                raise EngineError(
                    f"{program.file}: {kind}[{position}] is {found} with strides "
                    f"{list(found.stride)}, expected {spec} with {list(spec.stride)}"
                )

    def run(arguments: list[Tensor]) -> list[Tensor]:
        compare("inputs", program.inputs, arguments)
        results = native(arguments)
        compare("outputs", program.outputs, results)
        return results

    return run
