"""The parts of an engine's manifest: types, limits, and the checks that one part makes alone.

A manifest is untrusted input: sizes are bounded, names of files cannot leave the folder, and every
reference from one part to another is checked in `manifest.py` before anything is loaded.
"""

from __future__ import annotations

import inspect
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MAX_RANK = 16
MAX_ELEMENTS = 1 << 40
"""Of one tensor; a terabyte of bytes is a corrupted shape, not a model's."""

MAX_SLOTS = 1 << 20

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.bool, torch.complex64,
    )
}  # fmt: skip

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
# Letters first, so neither `..` nor an absolute path; at most one folder.
FileName = Annotated[
    str, StringConstraints(pattern=r"^(?:[A-Za-z0-9_-]{1,64}/)?[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$")
]
Size = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]
Slot = Annotated[int, Field(ge=0, lt=MAX_SLOTS)]
Plain = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str | None


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    return name


Dtype = Annotated[str, AfterValidator(_known_dtype)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Part):
    """What a tensor looks like: sizes, strides in elements, dtype, kind of device."""

    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_RANK)]
    stride: Annotated[tuple[Size, ...], Field(max_length=MAX_RANK)]
    dtype: Dtype
    device: Literal["cpu", "cuda"] = "cpu"

    def model_post_init(self, context: object) -> None:
        """Refuse sizes that no tensor has."""
        if len(self.shape) != len(self.stride):
            raise ValueError(f"{len(self.shape)} sizes, but {len(self.stride)} strides")
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True) if n)
        if max(prod(self.shape), reach) > MAX_ELEMENTS:
            raise ValueError(f"a tensor has at most {MAX_ELEMENTS} elements")

    @classmethod
    def of(cls, value: torch.Tensor) -> TensorSpec:
        """The spec of a tensor, real or fake."""
        return cls(
            shape=tuple(int(size) for size in value.shape),
            stride=tuple(int(step) for step in value.stride()),
            dtype=str(value.dtype).removeprefix("torch."),
            device="cuda" if value.device.type == "cuda" else "cpu",
        )

    def packed(self) -> TensorSpec:
        """The same without gaps, in row-major order."""
        stride, step = [], 1
        for size in reversed(self.shape):
            stride.append(step)
            step *= max(size, 1)
        return self.model_copy(update={"stride": tuple(reversed(stride))})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    def alike(self, other: TensorSpec) -> bool:
        """Whether both address their elements alike; the stride of an axis of length 1 is free."""
        return (self.shape, self.dtype, self.device) == (
            other.shape,
            other.dtype,
            other.device,
        ) and all(
            a == b or n <= 1 for n, a, b in zip(self.shape, self.stride, other.stride, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} on {self.device}"


class FileRecord(_Part):
    """A file of the bundle, pinned."""

    sha256: Sha256
    nbytes: Annotated[int, Field(ge=0)]


class InputSpec(_Part):
    """A tensor that the caller passes; its place in the list is its slot."""

    name: Name
    spec: TensorSpec


class Parameter(_Part):
    """One parameter of the model's forward; kinds as in `inspect`."""

    name: Name
    kind: Literal[
        "POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"
    ]
    required: bool
    default: Plain = None


class Call(_Part):
    """How the engine is called.

    Attributes:
        parameters: of the model's forward.
        inputs: every tensor, by name.
        fixed: leaves that are no tensors, with the only value that the engine was made for.
        result: structure of what is returned, see `values.describe_result`.
    """

    parameters: Annotated[tuple[Parameter, ...], Field(max_length=256)]
    inputs: Annotated[tuple[InputSpec, ...], Field(max_length=4096)]
    fixed: dict[Name, Plain]
    result: Any

    def signature(self) -> inspect.Signature:
        """The forward's signature, defaults that cannot be written down as None."""
        made = [
            inspect.Parameter(
                p.name,
                getattr(inspect.Parameter, p.kind),
                default=inspect.Parameter.empty if p.required else p.default,
            )
            for p in self.parameters
        ]
        return inspect.Signature(made)


class Program(_Part):
    """One native program and what it takes and gives."""

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Step(_Part):
    """One use of a program.

    Attributes:
        program: index into the manifest's programs.
        inputs: for each argument a slot of the environment or the name of a stored tensor.
        outputs: slots that it fills.
        free: slots that nothing reads afterwards.
        kernels: number of block-sparse attentions in it.
    """

    program: Slot
    inputs: tuple[Slot | Name, ...]
    outputs: tuple[Slot, ...]
    free: tuple[Slot, ...] = ()
    kernels: Slot = 0


class Kept(_Part):
    """Values that few inputs determine, computed once for each set of those inputs.

    Attributes:
        inputs: slots of these inputs.
        outputs: slots that the steps fill.
        steps: what computes them.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    steps: tuple[Step, ...]


class StackRecord(_Part):
    """What a skipped call forecasts: the block stack's outputs and the slots they continue."""

    outputs: tuple[Slot, ...]
    bases: tuple[Slot | None, ...]


class Wiring(_Part):
    """How programs make up one call of the model.

    Slots: the inputs, then values of `kept`, then values between programs.

    Attributes:
        slots: how many there are.
        hoisted: how many of them are filled by `kept`.
        before, after: around the block stack, in every call.
        bodies: the block stack, for each phase of the plan.
        kept: what is computed once per prompt or timestep.
        kept_always: indices into `kept` that every call needs.
        kept_by_phase: for each phase, indices that a full call of it needs.
        stack: what a skipped call forecasts.
        returned: a slot for each tensor of the result.
    """

    slots: Slot
    hoisted: Slot = 0
    before: tuple[Step, ...]
    bodies: Annotated[tuple[tuple[Step, ...], ...], Field(min_length=1)]
    after: tuple[Step, ...]
    kept: tuple[Kept, ...] = ()
    kept_always: tuple[Slot, ...] = ()
    kept_by_phase: tuple[tuple[Slot, ...], ...]
    stack: StackRecord | None = None
    returned: tuple[Slot, ...]


class Schedule(_Part):
    """The plan's calls, for runners that do not read plans; `ditopt` reads the plan itself.

    Attributes:
        phases: phase of each call.
        sources: for each call the (earlier full call, coefficient) pairs that it is forecast from;
            none for a full call.
    """

    phases: tuple[Slot, ...]
    sources: tuple[tuple[tuple[Slot, float], ...], ...]
