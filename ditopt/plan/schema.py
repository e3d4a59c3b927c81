"""The choices of a plan, version 1: types, units and the checks that one part can make alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ditopt.errors import PlanError
from ditopt.patterns import HeadPattern, Selector
from ditopt.plan.fields import Count, Float, Index, Part, PositiveFloat, Text, by_call, by_site
from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.quantization.rule import LinearRule

SUM_TOLERANCE = 1e-6
"""How far from 1 a row of forecast coefficients may sum: room for their rounding."""

MAX_GAIN = 32.0
"""Largest sum of magnitudes of such a row; it is how much the forecast amplifies noise."""


class Block(Part):
    """Tokens of one query block and of one key block."""

    q: Count = 128
    k: Count = 128


class MeanRemainder(Part):
    """The mean of each block that a site's lists leave out stands for it (Sol-Attn, 2607.24027).

    One weighted token for each block, in the same softmax; a skipped head sees every block so. No
    weights, no training.
    """

    kind: Literal["mean"] = "mean"


class LinearRemainder(Part):
    """Linear attention on the blocks that a site's lists leave out (SLA, arXiv 2509.24006).

    Its projection, [heads, channels, channels], is `remainder_tensor(site)` of the side file.

    Attributes:
        kind: linear.
        phi: feature map of queries and keys.
    """

    kind: Literal["linear"] = "linear"
    phi: Literal["softmax", "elu", "relu"] = "softmax"


Remainder = Annotated[MeanRemainder | LinearRemainder, Field(discriminator="kind")]
"""What stands for the blocks that an attention leaves out; without one they are dropped."""


def remainder_tensor(site: str) -> str:
    """Name of a site's projection in the side file."""
    return f"remainder/{site}"


class Phase(Part):
    """The choices for a range of calls.

    Attributes:
        calls: half-open range of the model's own call index, per guidance branch.
        attention: for each site that is not dense, one pattern per head.
        selectors: for each site that chooses its blocks from the data, how; no site of `attention`.
        remainders: for sites of the two, what stands for the blocks that are left out.
        arithmetic: for each site that multiplies in 8 bits, how; all its blocks, or its patterns'.
        linear: for each linear layer that is not left alone, its number format.
    """

    calls: tuple[Index, Index]
    attention: Annotated[dict[Text, tuple[HeadPattern, ...]], AfterValidator(by_site)] = Field(
        default_factory=dict
    )
    selectors: Annotated[dict[Text, Selector], AfterValidator(by_site)] = Field(
        default_factory=dict
    )
    remainders: Annotated[dict[Text, Remainder], AfterValidator(by_site)] = Field(
        default_factory=dict
    )
    arithmetic: Annotated[dict[Text, ArithmeticRule], AfterValidator(by_site)] = Field(
        default_factory=dict
    )
    linear: Annotated[dict[Text, LinearRule], AfterValidator(by_site)] = Field(default_factory=dict)


class Gate(Part):
    """A measured change that makes calls full although the schedule lets them skip.

    It never makes a call skip. Each decision costs one wait for the device.

    Attributes:
        kind: `first_block`: relative L1 change of the first blocks' residual since the last full
            call; `prediction`: relative L1 error of this call's forecast, were it made of the first
            blocks; `input`: relative L1 change of the stack's input since the last full call.
        threshold: a larger change, or one that is not a number, makes the call full.
        blocks: how many first blocks run before the decision; `input` runs none.
        order: of the polynomial that forecasts where the gate has run calls in full, so that the
            coefficients' history is not the planned one; null is 1, or 0 with a history of 1.
    """

    kind: Literal["first_block", "prediction", "input"]
    threshold: PositiveFloat
    blocks: Annotated[int, Field(ge=1, le=64)] | None = None
    order: Annotated[int, Field(ge=0, le=3)] | None = None

    def model_post_init(self, context: object) -> None:
        """Refuse blocks that nothing would run."""
        if self.kind == "input" and self.blocks is not None:
            raise PlanError("cache.gate.blocks: a gate on the input runs no blocks; drop it")


class Cache(Part):
    """Which calls run the block stack, and how the others are forecast.

    Attributes:
        full: ascending call indices that compute everything; the first call is one.
        history: largest number of stored residuals.
        coefficients: for each other call one coefficient per stored residual, newest first, sum 1.
        gate: may run such a call in full.
    """

    full: Annotated[tuple[Index, ...], Field(min_length=1)]
    history: Annotated[int, Field(ge=1, le=8)] = 1
    coefficients: Annotated[dict[Index, tuple[Float, ...]], AfterValidator(by_call)] = Field(
        default_factory=dict
    )
    gate: Gate | None = None

    def model_post_init(self, context: object) -> None:
        """Check the order of `full`, each row of `coefficients`, and that a gate has work."""
        if self.gate is not None and not self.coefficients:
            raise PlanError("cache.gate: no call may skip, so there is nothing to decide; drop it")
        if self.full[0] != 0 or any(a >= b for a, b in zip(self.full, self.full[1:], strict=False)):
            raise PlanError("cache.full: expected ascending call indices from 0")
        for call, row in self.coefficients.items():
            self._check_row(call, row)

    def _check_row(self, call: int, row: tuple[float, ...]) -> None:
        field = f"cache.coefficients[{call}]"
        if call in self.full:
            raise PlanError(f"{field}: call {call} is full; drop it from one of the two lists")
        stored = min(self.history, sum(full < call for full in self.full))
        if not 1 <= len(row) <= stored:
            raise PlanError(
                f"{field}: expected 1 to {stored} numbers, one per stored residual, got {len(row)}"
            )
        if abs(sum(row) - 1) > SUM_TOLERANCE:
            raise PlanError(
                f"{field}: expected a sum of 1 (a constant must stay one), got {sum(row):.8g}"
            )
        if (gain := sum(map(abs, row))) > MAX_GAIN:
            raise PlanError(
                f"{field}: expected magnitudes that sum to {MAX_GAIN:g} at most, got {gain:g}"
            )
