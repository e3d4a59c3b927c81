"""The parts of a plan, version 1: types, units and the checks that one part can make alone."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from ditopt.errors import PlanError
from ditopt.patterns import HeadPattern, Selector
from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.quantization.rule import LinearRule

SUM_TOLERANCE = 1e-6
"""How far from 1 a row of forecast coefficients may sum: room for their rounding."""

MAX_GAIN = 32.0
"""Largest sum of magnitudes of such a row; it is how much the forecast amplifies noise."""


_Rule = TypeVar("_Rule")
_NUMBERED = re.compile(r"(\D*)(\d*)")


def _rounded(value: float) -> float:
    """Nine significant digits: every float32 survives, and last bits do not change the text."""
    return float(f"{value:.9g}")


Float = Annotated[float, AfterValidator(_rounded), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Index = Annotated[int, Field(ge=0, le=1 << 31)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
FileName = Annotated[str, StringConstraints(pattern=r"^[\w\-][\w\-. ]{0,200}\.safetensors$")]


def _by_call(rows: dict[int, tuple[float, ...]]) -> dict[int, tuple[float, ...]]:
    return dict(sorted(rows.items()))


def _by_site(rules: dict[str, _Rule]) -> dict[str, _Rule]:
    """In natural order, `blocks.2` before `blocks.10`: equal rules give equal text."""
    return dict(sorted(rules.items(), key=lambda rule: (_natural(rule[0]), rule[0])))


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or -1)) for text, number in _NUMBERED.findall(name)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteRecord(_Part):
    """An attention site of the profiled model.

    Attributes:
        id: stable id, module path and ordinal (`blocks.3.attn1#0`).
        kind: self, cross or joint (image and text in one sequence).
        heads: query heads.
        head_dim: size D of one head.
    """

    id: Text
    kind: Literal["self", "cross", "joint"]
    heads: Count
    head_dim: Count


class LinearRecord(_Part):
    """A linear layer of the profiled model; `id` is its module path."""

    id: Text
    in_features: Count
    out_features: Count


class ModelRecord(_Part):
    """The model a plan belongs to.

    Attributes:
        architecture: sha256 over parameter names, shapes and dtypes.
        weights: sha256 over the values.
        name: the model's class, for people.
        sites: every attention site in execution order.
        linears: the linear layers that rules may name, in execution order.
    """

    architecture: Sha256
    weights: Sha256
    name: Text
    sites: tuple[SiteRecord, ...]
    linears: tuple[LinearRecord, ...] = ()


class Sampler(_Part):
    """The denoising loop, as seen from the model's calls.

    Attributes:
        calls: calls of the model in one loop, per guidance branch.
        branches: guidance branches that call the model separately; 1 where they are one batch.
        timestep: name of the model input that carries the timestep, or null.
        timesteps: its value at each call; empty without such an input.
        varying: names of the inputs that change from call to call, the timestep among them.
    """

    calls: Count
    branches: Count = 1
    timestep: Text | None = None
    timesteps: tuple[Float, ...] = ()
    varying: tuple[Text, ...] = ()


class Hardware(_Part):
    """Where the costs were measured."""

    device: Text
    name: Text
    torch: Text
    threads: Count


class Goal(_Part):
    """What was asked for: everything that is stated, and at least one thing.

    With a quality, the fastest plan that keeps it; else the plan of best quality within the rest.

    Attributes:
        min_psnr_db: mean over seeds of the PSNR against the dense result, in dB.
        min_ssim: mean over seeds of the SSIM against the dense result.
        target_speedup: time of one dense sampling loop over the plan's.
        max_memory_bytes: of weights and stored residuals.
    """

    min_psnr_db: PositiveFloat | None = None
    min_ssim: Annotated[Float, Field(gt=0, lt=1)] | None = None
    target_speedup: Annotated[Float, Field(gt=1)] | None = None
    max_memory_bytes: Annotated[int, Field(ge=1, le=1 << 50)] | None = None

    def model_post_init(self, context: object) -> None:
        """Refuse no goal."""
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise PlanError(f"goal: expected at least one of {', '.join(type(self).model_fields)}")

    def __str__(self) -> str:
        parts = {
            "PSNR >= {:g} dB": self.min_psnr_db,
            "SSIM >= {:g}": self.min_ssim,
            "speedup >= {:g}x": self.target_speedup,
            "memory <= {:.4g} MiB": self.max_memory_bytes and self.max_memory_bytes / 2**20,
        }
        return " and ".join(text.format(value) for text, value in parts.items() if value)


class Block(_Part):
    """Tokens of one query block and of one key block."""

    q: Count = 128
    k: Count = 128


class MeanRemainder(_Part):
    """The mean of each block that a site's lists leave out stands for it (Sol-Attn, 2607.24027).

    One weighted token for each block, in the same softmax; a skipped head sees every block so. No
    weights, no training.
    """

    kind: Literal["mean"] = "mean"


class LinearRemainder(_Part):
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


class Phase(_Part):
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
    attention: Annotated[dict[Text, tuple[HeadPattern, ...]], AfterValidator(_by_site)] = {}
    selectors: Annotated[dict[Text, Selector], AfterValidator(_by_site)] = {}
    remainders: Annotated[dict[Text, Remainder], AfterValidator(_by_site)] = {}
    arithmetic: Annotated[dict[Text, ArithmeticRule], AfterValidator(_by_site)] = {}
    linear: Annotated[dict[Text, LinearRule], AfterValidator(_by_site)] = {}


class Gate(_Part):
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


class Cache(_Part):
    """Which calls run the block stack, and how the others are forecast.

    Attributes:
        full: ascending call indices that compute everything; the first call is one.
        history: largest number of stored residuals.
        coefficients: for each other call one coefficient per stored residual, newest first, sum 1.
        gate: may run such a call in full.
    """

    full: Annotated[tuple[Index, ...], Field(min_length=1)]
    history: Annotated[int, Field(ge=1, le=8)] = 1
    coefficients: Annotated[dict[Index, tuple[Float, ...]], AfterValidator(_by_call)] = {}
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


class Predicted(_Part):
    """What the search expects of one sampling loop, from the profile.

    Attributes:
        seconds: time of the loop.
        speedup: dense time over it.
        psnr_db: PSNR against the dense result; null for a plan without any approximation.
        ssim: SSIM likewise.
        bytes: weights in their formats and stored residuals.
        density: kept fraction of attention blocks in the last phase, mean over heads and sites.
    """

    seconds: PositiveFloat
    speedup: PositiveFloat
    psnr_db: Float | None
    ssim: Float | None = None
    bytes: Annotated[int, Field(ge=0)] | None = None
    density: Annotated[Float, Field(ge=0, le=1)]


class Verification(_Part):
    """One measurement by full sampling.

    Attributes:
        purpose: `tune` (the search looked at it) or `audit` (fresh seeds; the only quality claim).
        seeds: the seeds that were sampled.
        psnr_db: PSNR against dense for each seed.
        mean_psnr_db: their mean, which a PSNR goal is about.
        min_psnr_db: the worst seed.
        p10_psnr_db: the tenth percentile over seeds.
        mean_ssim: mean over seeds of the SSIM, which an SSIM goal is about.
        speedup: dense time over the plan's time; null where it was not measured.
        margin_db: how far above the goal the search aimed.
        passed: whether the goal was met.
        adopted: whether it is about this very plan, not about one tried before it.
    """

    purpose: Literal["tune", "audit"]
    seeds: Annotated[tuple[Index, ...], Field(min_length=1)]
    psnr_db: Annotated[tuple[Float, ...], Field(min_length=1)]
    mean_psnr_db: Float
    min_psnr_db: Float
    p10_psnr_db: Float
    mean_ssim: Float | None = None
    speedup: PositiveFloat | None = None
    margin_db: Float = 0.0
    passed: bool
    adopted: bool


class SideFile(_Part):
    """A safetensors file beside the plan."""

    name: FileName
    sha256: Sha256
