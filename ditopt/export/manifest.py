"""`Manifest`: what an engine's folder holds, checked as a whole before anything is loaded."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ditopt.errors import EngineError
from ditopt.export.schema import (
    Call,
    FileName,
    FileRecord,
    Plain,
    Program,
    Sha256,
    TensorSpec,
    Text,
)
from ditopt.export.wiring import Schedule, Wiring
from ditopt.export.wiring_check import WiringCheck

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PLAN = "plan.yaml"

_REMEDY = "Export the engine anew, or copy the whole folder again."


class Manifest(BaseModel):
    """The contents of `manifest.json`.

    Attributes:
        ditopt_engine: version of this schema.
        format: `pt2`, or `onnx`, whose programs hold their weights and run in other runtimes.
        name: the model's class.
        architecture, weights: fingerprints of the model, as in a plan.
        plan: sha256 of the plan's file; null without a plan.
        cached: whether the plan's skip calls are forecast.
        device, dtype: of the model's parameters.
        config: the model's `config`, as far as it can be written down.
        environment: versions and devices that the programs were made for.
        call: how the engine is called.
        tensors: every stored tensor.
        programs, wiring: what runs.
        schedule: the plan's calls in short.
        files: every other file of the folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ditopt_engine: Literal[1] = 1
    format: Literal["pt2", "onnx", "tensorrt"]
    name: Text
    architecture: Sha256
    weights: Sha256
    plan: Sha256 | None = None
    cached: bool = False
    device: Literal["cpu", "cuda"]
    dtype: Text
    config: dict[str, Any] = {}
    environment: dict[str, Plain]
    call: Call
    tensors: dict[str, TensorSpec]
    programs: tuple[Program, ...]
    wiring: Wiring
    schedule: Schedule | None = None
    files: dict[FileName, FileRecord]

    def to_text(self) -> str:
        """The manifest as JSON; equal manifests give equal text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse and check.

        Raises:
            EngineError: malformed, or parts that contradict each other; names the field.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{MANIFEST} is not JSON: {error}", remedy=_REMEDY) from None
        version = document.get("ditopt_engine") if isinstance(document, dict) else None
        if version != 1 or isinstance(version, bool):
            raise EngineError(
                f"ditopt_engine: expected version 1, got {version!r}",
                remedy="Export the engine anew with this version of ditopt.",
            )
        try:
            manifest = cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise EngineError(_first_problem(error), remedy=_REMEDY) from None
        _check(manifest)
        return manifest


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}, got {shown}"


def _check(manifest: Manifest) -> None:
    """References between the parts, and the type of every value that a program reads."""
    for field, names in (
        ("files", [WEIGHTS] if manifest.tensors else []),
        ("files", [PLAN] if manifest.plan is not None else []),
        ("programs", [program.file for program in manifest.programs]),
    ):
        for name in names:
            if name not in manifest.files:
                raise EngineError(f"{field}: {name} is not listed in files", remedy=_REMEDY)
    if manifest.plan is not None and manifest.files[PLAN].sha256 != manifest.plan:
        raise EngineError(
            f"plan: {PLAN} has sha256 {manifest.files[PLAN].sha256}, expected {manifest.plan}",
            remedy=_REMEDY,
        )
    known = {item.name for item in manifest.call.inputs} | set(manifest.call.fixed)
    if len(known) != len(manifest.call.inputs) + len(manifest.call.fixed):
        raise EngineError("call.inputs: a name appears twice", remedy=_REMEDY)
    _check_sizes(manifest.call)
    try:
        manifest.call.signature()
    except ValueError as error:
        raise EngineError(f"call.parameters: {error}", remedy=_REMEDY) from None
    _check_result(manifest.call.result, "call.result", 0)
    if _tensors_in(manifest.call.result) != len(manifest.wiring.returned):
        raise EngineError(
            f"wiring.returned: {len(manifest.wiring.returned)} slots for "
            f"{_tensors_in(manifest.call.result)} tensors in call.result",
            remedy=_REMEDY,
        )
    WiringCheck(manifest, _REMEDY).run()


def _check_sizes(call: Call) -> None:
    for number, item in enumerate(call.inputs):
        for axis, name in item.axes:
            field = f"call.inputs.{number}.axes"
            if axis >= len(item.spec.shape) or name not in call.sizes:
                raise EngineError(f"{field}: there is no axis {axis} or no size {name!r}")
            if not call.sizes[name].holds(item.spec.shape[axis]):
                raise EngineError(
                    f"{field}: {item.spec.shape[axis]} on axis {axis} is none of "
                    f"call.sizes.{name} ({call.sizes[name]})",
                    remedy=_REMEDY,
                )


def _check_result(part: Any, field: str, depth: int) -> None:
    if part is None or part == "tensor":
        return
    ok = isinstance(part, list) and len(part) == 2 and part[0] in ("tuple", "list", "mapping")
    if not ok or depth > 8 or not isinstance(part[1], list) or len(part[1]) > 4096:
        raise EngineError(f"{field}: not the structure of a result", remedy=_REMEDY)
    for number, member in enumerate(part[1]):
        if not (isinstance(member, list) and len(member) == 2 and isinstance(member[0], str)):
            raise EngineError(f"{field}[{number}]: expected a name and a part", remedy=_REMEDY)
        _check_result(member[1], f"{field}[{number}]", depth + 1)


def _tensors_in(part: Any) -> int:
    if part is None or part == "tensor":
        return int(part == "tensor")
    return sum(_tensors_in(member) for _, member in part[1])
