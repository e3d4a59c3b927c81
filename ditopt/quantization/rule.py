"""What a plan says about one linear layer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

Format = Literal["none", "fp8_row", "int8_row", "int4_group", "twin_log", "codebook"]
Transform = Literal["none", "centre", "balance", "rotate"]

STORAGE: tuple[Format, ...] = ("int4_group", "twin_log", "codebook")
"""Formats of the weight alone: decoded at every call, smaller and never faster."""


class LinearRule(BaseModel):
    """How one linear layer computes; see `ditopt.quantization`.

    Attributes:
        format: `fp8_row` and `int8_row` multiply in 8 bits, one scale per token and one per output
            channel; `int4_group`, `twin_log` (4 bits) and `codebook` (2 bits) store the weight;
            `none` applies the transform alone, which changes nothing but rounding.
        transform: what is done to the input, exactly undone in weight and bias, before it is
            rounded: `centre` subtracts the recorded mean of each channel, `balance` divides each
            channel by a scale between the input's and the weight's, `rotate` balances and then
            mixes the channels of each block by a regular Hadamard matrix.
        simulate: allowed to compute the format's numbers in float32 where the device lacks the
            format; slower than leaving the layer alone, and reported so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format
    transform: Transform = "none"
    simulate: bool = False

    @model_validator(mode="after")
    def _format_and_transform_fit(self) -> Self:
        if self.format == "none" and self.transform == "none":
            raise ValueError("a rule without format and transform says nothing; leave it out")
        if self.format in STORAGE and self.transform != "none":
            raise ValueError(
                f"format {self.format!r} rounds the weight alone and takes transform 'none'"
            )
        return self
