"""One quantized layer: what it keeps of its weight and bias, and how it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ditopt.errors import WeightError
from ditopt.quantization import transforms
from ditopt.quantization.codebook import Codebook, calibrated_parts
from ditopt.quantization.group import Group
from ditopt.quantization.rowwise import FP8_ROW, INT8_ROW, SMALLEST, RowFormat, quantize_by
from ditopt.quantization.twin_log import TwinLog

if TYPE_CHECKING:
    from ditopt.quantization.rule import LinearRule

aten = torch.ops.aten

Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


class StoredFormat(Protocol):
    """A format of the weight alone.

    Attributes:
        name: as in a plan.
        multiple: what K must be a multiple of.
    """

    name: str
    multiple: int

    def parts(self, n: int, k: int) -> Parts:
        """Shape and dtype of what `encode` gives for a weight [N, K]."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored weight, from [N, K] in float32."""

    def decode(self, parts: Mapping[str, Any], n: int, k: int, out: torch.dtype) -> Any:
        """The weight [N, K] in dtype `out`; in ATen operators, as `rowwise` explains."""


ROW_FORMATS: dict[str, RowFormat] = {f.name: f for f in (FP8_ROW, INT8_ROW)}
STORED_FORMATS: dict[str, StoredFormat] = {
    f.name: f for f in (Group(4), Group(2), TwinLog(4), TwinLog(2), Codebook())
}
ROW_SCALE = "row_scale"
"""Of a stored weight that is multiplied in 8 bits: scales [1, N] of the decoded rows."""
INPUT_AMAX = "input_amax"
"""Of a static rule: largest magnitude [1, 1] of the input, transformed."""


def misfit(rule: LinearRule, k: int) -> str | None:
    """Why a rule does not fit any layer with K input channels, or None."""
    if rule.transform.startswith("rotate") and transforms.rotation_block(k) is None:
        return f"K = {k} is no multiple of 4, as the rotation needs"
    stored = STORED_FORMATS.get(rule.format)
    if stored is not None and k % stored.multiple:
        return f"K = {k} is no multiple of {stored.multiple}, as {rule.format} needs"
    return None


def operands(rule: LinearRule, n: int, k: int, dtype: torch.dtype) -> Parts:
    """Shape and dtype of each tensor that `derive` makes, in order.

    Args:
        rule: of the plan.
        n: output channels.
        k: input channels.
        dtype: of the model's weight.
    """
    wide = computing_dtype(dtype)
    found: Parts = {}
    if rule.format == "none":
        found["weight"] = ((n, k), dtype)
    else:
        found |= _format(rule).parts(n, k)
    if rule.activation != "none":
        found[ROW_SCALE] = ((1, n), torch.float32)
    if rule.static is not None:
        found[INPUT_AMAX] = ((1, 1), torch.float32)
    found |= transforms.parts(rule.transform, k, wide)
    if rule.transform == "centre":
        found["bias"] = ((n,), dtype)
    return found


def derive(
    rule: LinearRule,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    statistics: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What the layer keeps in place of its weight, under the names of `operands`.

    Args:
        rule: of the plan.
        weights: [N_i, K] each, one below the other.
        biases: [N_i] each; empty without.
        statistics: of the input channels, as the transform needs them.

    Raises:
        WeightError: a weight is not finite, so no scale fits it.
    """
    stacked = torch.cat([weight.detach() for weight in weights])
    dtype = stacked.dtype
    wide = stacked.to(computing_dtype(dtype))
    if not bool(torch.isfinite(wide).all()):
        raise WeightError(
            "a weight to be quantized holds NaN or infinity",
            remedy="Repair the checkpoint, or leave the layer out of the plan's `linear` rules.",
        )
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    weight, bias, found = transforms.fold(rule.transform, wide, bias, statistics)
    if rule.transform == "centre":
        assert bias is not None
        found["bias"] = bias.to(dtype)
    if rule.format == "none":
        return {"weight": weight.to(dtype), **found}
    if rule.static is not None:
        seen = statistics["range_amax"][rule.static].to(weight) * found.get("stretch", 1.0)
        found[INPUT_AMAX] = seen.amax().clamp(min=SMALLEST).float().reshape(1, 1)
    if rule.calibrated:
        return {**calibrated_parts(statistics, wide), **found}
    made = _format(rule).encode(weight.float())
    if rule.activation != "none":
        n, k = weight.shape
        decoded = STORED_FORMATS[rule.format].decode(made, n, k, torch.float32)
        found[ROW_SCALE] = ROW_FORMATS[rule.activation].encode(decoded)["scale"]
    return {**made, **found}


def compute(
    rule: LinearRule,
    x: Any,
    made: Mapping[str, Any],
    bias: Any,
    *,
    n: int,
    k: int,
    dtype: torch.dtype,
    native: bool,
    rounded: tuple[Any, Any] | None = None,
) -> Any:
    """The layer's result [M, N].

    Args:
        rule: of the plan.
        x: [M, K]; a tensor, or an `fx.Proxy` to write the operators into a graph.
        made: what `derive` gives.
        bias: [N] or None; unused where `derive` makes one.
        n: N.
        k: K.
        dtype: of x and of the result.
        native: whether the device multiplies the format itself.
        rounded: numbers and scales of x for an 8-bit format, where they were made elsewhere.
    """
    bias = made.get("bias", bias)
    if rule.transform != "none":
        wide = aten.to.dtype(x, computing_dtype(dtype))
        x = transforms.apply(wide, rule.transform, made, k)
    row = ROW_FORMATS.get(rule.product or "")
    if row is not None:
        if rule.static is not None:
            rounded = quantize_by(x, made[INPUT_AMAX], row.largest, row.dtype)
        if rule.activation != "none":
            decoded = STORED_FORMATS[rule.format].decode(made, n, k, torch.float32)
            made = row.encode_again(decoded, made[ROW_SCALE])
        return row.multiply(x, made, bias, dtype, native=native, rounded=rounded)
    if rule.format == "none":
        x = x if dtype == computing_dtype(dtype) else aten.to.dtype(x, dtype)
        return aten.linear.default(x, made["weight"], bias)
    weight = STORED_FORMATS[rule.format].decode(made, n, k, dtype)
    return aten.linear.default(x, weight, bias)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _format(rule: LinearRule) -> RowFormat | StoredFormat:
    return ROW_FORMATS.get(rule.format) or STORED_FORMATS[rule.format]
