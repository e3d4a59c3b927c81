"""What a plan says about one linear layer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Format = Literal[
    "none",
    "fp8_row",
    "int8_row",
    "int4_group",
    "int2_group",
    "twin_log",
    "twin_log2",
    "codebook",
]
Transform = Literal["none", "centre", "balance", "rotate", "rotate_twice"]
Activation = Literal["none", "fp8_row", "int8_row"]

STORAGE: tuple[Format, ...] = ("int4_group", "int2_group", "twin_log", "twin_log2", "codebook")
"""Formats of the weight alone: decoded at every call, smaller and never faster."""


class LinearRule(BaseModel):
    """How one linear layer computes; see `ditopt.quantization`.

    Attributes:
        format: `fp8_row` and `int8_row` multiply in 8 bits, one scale per token and one per output
            channel; `int4_group`, `twin_log` (4 bits), `int2_group`, `twin_log2` and `codebook`
            (2 bits) store the weight; `none` applies the transform alone, which changes nothing but
            rounding.
        activation: of a stored weight: the 8-bit format that the layer multiplies in. The decoded
            weight is rounded to its rows, the input as in that format (W4A8).
        transform: what is done to the input, exactly undone in weight and bias, before it is
            rounded: `centre` subtracts the recorded mean of each channel, `balance` divides each
            channel by a scale between the input's and the weight's, `rotate` balances and then
            mixes the channels of each block by a regular Hadamard matrix; `rotate_twice` deals the
            mixed channels out to other blocks and mixes again.
        static: the number of a recorded range of calls, whose largest magnitude then scales every
            token in place of the token's own: for engines that know constant scales only. Larger
            values are clipped.
        calibrated: of a codebook: codes and words come from the plan's side file, where
            `quantization.block_calibration` put them, not from the weight alone.
        simulate: allowed to compute the format's numbers in float32 where the device lacks the
            format; slower than leaving the layer alone, and reported so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format
    activation: Activation = "none"
    transform: Transform = "none"
    static: Annotated[int, Field(ge=0, le=1000)] | None = None
    calibrated: bool = False
    simulate: bool = False

    @property
    def product(self) -> str | None:
        """The 8-bit format that the layer multiplies in, or None."""
        if self.activation != "none":
            return self.activation
        return None if self.format in ("none", *STORAGE) else self.format

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.format == "none" and self.transform == "none":
            raise ValueError("a rule without format and transform says nothing; leave it out")
        if self.activation != "none" and self.format not in STORAGE:
            raise ValueError(
                f"activation {self.activation!r} goes with a stored weight; format "
                f"{self.format!r} rounds the input itself"
            )
        if self.format in STORAGE and self.transform != "none" and self.activation == "none":
            raise ValueError(
                f"format {self.format!r} rounds the weight alone and takes transform 'none'"
            )
        if self.static is not None and (
            self.product is None or self.transform not in ("none", "balance")
        ):
            raise ValueError("static scales are of 8-bit inputs, as they are or balanced")
        if self.calibrated and (self.format != "codebook" or self.transform != "none"):
            raise ValueError("only a codebook without a transform is calibrated")
        return self
