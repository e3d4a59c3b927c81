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

from ditopt.symbols import hint

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


class Part(BaseModel):
    """Any part of a manifest: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(Part):
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
        """The spec of a tensor, real or fake; of open sizes what they were at export."""
        return cls(
            shape=tuple(map(hint, value.shape)),
            stride=tuple(map(hint, value.stride())),
            dtype=str(value.dtype).removeprefix("torch."),
            device="cuda" if value.device.type == "cuda" else "cpu",
        )

    def of_shape(self, shape: tuple[int, ...]) -> TensorSpec:
        """The same with other sizes: dense, axes in the same order in memory."""
        if shape == self.shape:
            return self
        order = sorted(range(len(shape)), key=lambda axis: (self.stride[axis], -axis))
        stride, step = [0] * len(shape), 1
        for axis in order:
            stride[axis] = step
            step *= max(shape[axis], 1)
        return self.model_copy(update={"shape": shape, "stride": tuple(stride)})

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


class FileRecord(Part):
    """A file of the bundle, pinned."""

    sha256: Sha256
    nbytes: Annotated[int, Field(ge=0)]


class SizeRange(Part):
    """Values of a size that is left open: `least`, `least + step`, ... up to `most`."""

    least: Annotated[int, Field(ge=1, le=MAX_ELEMENTS)]
    most: Annotated[int, Field(ge=1, le=MAX_ELEMENTS)]
    step: Annotated[int, Field(ge=1, le=MAX_ELEMENTS)] = 1

    def holds(self, size: int) -> bool:
        """Whether a size is one of them."""
        return self.least <= size <= self.most and (size - self.least) % self.step == 0

    def __str__(self) -> str:
        steps = "" if self.step == 1 else f" in steps of {self.step}"
        return f"{self.least} to {self.most}{steps}"


class InputSpec(Part):
    """A tensor that the caller passes; its place in the list is its slot.

    Attributes:
        name: of the argument.
        spec: as it was at export.
        axes: the open ones, with the name of their size in `Call.sizes`; equal names, equal sizes.
    """

    name: Name
    spec: TensorSpec
    axes: Annotated[tuple[tuple[Slot, Name], ...], Field(max_length=MAX_RANK)] = ()


class Parameter(Part):
    """One parameter of the model's forward; kinds as in `inspect`."""

    name: Name
    kind: Literal[
        "POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"
    ]
    required: bool
    default: Plain = None


class Call(Part):
    """How the engine is called.

    Attributes:
        parameters: of the model's forward.
        inputs: every tensor, by name.
        sizes: ranges of the sizes that are left open.
        fixed: leaves that are no tensors, with the only value that the engine was made for.
        result: structure of what is returned, see `values.describe_result`.
    """

    parameters: Annotated[tuple[Parameter, ...], Field(max_length=256)]
    inputs: Annotated[tuple[InputSpec, ...], Field(max_length=4096)]
    sizes: dict[Name, SizeRange] = {}
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


class Program(Part):
    """One native program and what it takes and gives."""

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
