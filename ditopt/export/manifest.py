"""`Manifest`: what an engine's folder holds, checked as a whole before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ditopt.errors import EngineError
from ditopt.export.schema import (
    Call,
    FileName,
    FileRecord,
    Kept,
    Plain,
    Program,
    Schedule,
    Sha256,
    Slot,
    Step,
    TensorSpec,
    Text,
    Wiring,
)

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
        plan: sha256 of the plan's text; null without a plan.
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
    known = {item.name for item in manifest.call.inputs} | set(manifest.call.fixed)
    if len(known) != len(manifest.call.inputs) + len(manifest.call.fixed):
        raise EngineError("call.inputs: a name appears twice", remedy=_REMEDY)
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
    _WiringCheck(manifest).run()


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


class _WiringCheck:
    """Runs the wiring on specs: each program must find exactly what it was compiled for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.wiring = manifest.wiring
        self.inputs = [item.spec for item in manifest.call.inputs]

    def run(self) -> None:
        wiring, phases = self.wiring, len(self.wiring.bodies)
        if len(self.inputs) + wiring.hoisted > wiring.slots:
            self._fail("wiring.slots", f"{wiring.slots} slots do not hold the inputs")
        if len(wiring.kept_by_phase) != phases:
            self._fail("wiring.kept_by_phase", f"expected {phases} lists, one per phase")
        schedule = self.manifest.schedule
        if schedule is not None:
            if len(schedule.phases) != len(schedule.sources):
                self._fail("schedule.sources", f"expected {len(schedule.phases)} lists")
            if any(phase >= phases for phase in schedule.phases):
                self._fail("schedule.phases", f"there are {phases} phases")
        for phase in range(phases):
            self._run_phase(phase)
        if wiring.stack is not None:
            self._run_skip(wiring.stack.outputs, wiring.stack.bases)

    def _fresh(self, kept: Sequence[int], field: str) -> dict[int, TensorSpec]:
        env = dict(enumerate(self.inputs))
        first, last = len(self.inputs), len(self.inputs) + self.wiring.hoisted
        for number in kept:
            if number >= len(self.wiring.kept):
                self._fail(field, f"there is no wiring.kept[{number}]")
            record = self.wiring.kept[number]
            where = f"wiring.kept[{number}]"
            own = self._of(record, env, where)
            for slot in record.outputs:
                if not first <= slot < last:
                    self._fail(f"{where}.outputs", f"slot {slot} is not one of the hoisted ones")
                if slot not in own:
                    self._fail(f"{where}.outputs", f"nothing fills slot {slot}")
                env[slot] = own[slot]
        return env

    def _of(self, record: Kept, env: dict[int, TensorSpec], where: str) -> dict[int, TensorSpec]:
        for slot in record.inputs:
            if slot not in env:
                self._fail(f"{where}.inputs", f"slot {slot} is not filled yet")
        return self._steps(record.steps, dict(env), f"{where}.steps")

    def _run_phase(self, phase: int) -> None:
        wiring = self.wiring
        env = self._fresh(wiring.kept_by_phase[phase], f"wiring.kept_by_phase[{phase}]")
        env = self._steps(wiring.before, env, "wiring.before")
        env = self._steps(wiring.bodies[phase], env, f"wiring.bodies[{phase}]")
        if wiring.stack is not None:
            self._need(wiring.stack.outputs, env, "wiring.stack.outputs")
        env = self._steps(wiring.after, env, "wiring.after")
        self._need(wiring.returned, env, "wiring.returned")

    def _run_skip(self, outputs: Sequence[Slot], bases: Sequence[Slot | None]) -> None:
        wiring = self.wiring
        if len(outputs) != len(bases):
            self._fail("wiring.stack.bases", f"expected {len(outputs)}, one per output")
        full = self._fresh(wiring.kept_by_phase[0], "wiring.kept_by_phase[0]")
        full = self._steps(wiring.before, full, "wiring.before")
        full = self._steps(wiring.bodies[0], full, "wiring.bodies[0]")
        if not self.manifest.cached:
            return
        env = self._fresh(wiring.kept_always, "wiring.kept_always")
        env = self._steps(wiring.before, env, "wiring.before")
        for slot, base in zip(outputs, bases, strict=True):
            if base is not None and env.get(base) is None:
                self._fail("wiring.stack.bases", f"slot {base} is not filled before the stack")
            if base is not None and env[base].shape != full[slot].shape:
                self._fail("wiring.stack.bases", f"slot {base} has another shape than slot {slot}")
            env[slot] = full[slot]
        self._need(wiring.returned, self._steps(wiring.after, env, "wiring.after"), "returned")

    def _steps(
        self, steps: Sequence[Step], env: dict[int, TensorSpec], where: str
    ) -> dict[int, TensorSpec]:
        for number, step in enumerate(steps):
            field = f"{where}[{number}]"
            if step.program >= len(self.manifest.programs):
                self._fail(f"{field}.program", f"there is no program {step.program}")
            program = self.manifest.programs[step.program]
            for kind, given, wanted in (
                ("inputs", step.inputs, program.inputs),
                ("outputs", step.outputs, program.outputs),
            ):
                if len(given) != len(wanted):
                    self._fail(f"{field}.{kind}", f"expected {len(wanted)}, got {len(given)}")
            for position, found in enumerate(self._arguments(step, env, field)):
                if not program.inputs[position].alike(found):
                    self._fail(
                        f"{field}.inputs[{position}]",
                        f"the program takes {program.inputs[position]}, this is {found}",
                    )
            for slot, spec in zip(step.outputs, program.outputs, strict=True):
                if not len(self.inputs) <= slot < self.wiring.slots:
                    self._fail(f"{field}.outputs", f"slot {slot} is out of range")
                env[slot] = spec
            for slot in step.free:
                if env.pop(slot, None) is None or slot < len(self.inputs) + self.wiring.hoisted:
                    self._fail(f"{field}.free", f"slot {slot} is not one between programs")
        return env

    def _arguments(
        self, step: Step, env: dict[int, TensorSpec], field: str
    ) -> Iterator[TensorSpec]:
        for position, source in enumerate(step.inputs):
            known = env.get(source) if isinstance(source, int) else None
            if isinstance(source, str):
                known = self.manifest.tensors.get(source)
            if known is None:
                self._fail(f"{field}.inputs[{position}]", f"nothing fills {source!r}")
            yield known

    def _need(self, slots: Sequence[int], env: dict[int, TensorSpec], field: str) -> None:
        for slot in slots:
            if slot not in env:
                self._fail(field, f"nothing fills slot {slot}")

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise EngineError(f"{field}: {problem}", remedy=_REMEDY)
