"""Gates: a measured change decides whether a call that the schedule lets skip may really skip.

A gate costs one block of the stack (none for `input`) and one wait for the device per such call. It
can only make more calls full; those that the schedule wants in full stay full.

- `first_block`: how far the first blocks' residual has moved since the last full call
  (First-Block Cache, ParaAttention): `mean |r - r_ref| / mean |r_ref|`.
- `prediction`: how wrong this call's own forecast row would be about the first blocks, which are
  known (after Confidence-Gated Taylor, arXiv 2508.02240): `mean |h_pred - h| / mean |h|`.
- `input`: how far the stack's input has moved since the last full call.

Where blocks carry several streams (image and text), all of them count, by their elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ditopt.runtime.forecast import forecast

Kind = Literal["first_block", "prediction", "input"]
Signals = Sequence[Tensor]


@dataclass(frozen=True)
class Gate:
    """When a call that may skip has to run in full.

    Attributes:
        kind: what is measured, see above.
        threshold: a larger change means full, and so does NaN.
        order: of the polynomial that forecasts where more calls ran in full than planned, so that
            the plan's row does not fit; at most the number of stored residuals less one.
        group: name of the process group whose ranks decide together, by their largest change;
            None where each rank decides for itself.
    """

    kind: Kind
    threshold: float
    order: int = 1
    group: str | None = None

    @property
    def probes(self) -> bool:
        """Whether the first blocks run before the decision."""
        return self.kind != "input"

    def opens(self, value: float) -> bool:
        """Whether a call may skip; written so that NaN may not."""
        return value <= self.threshold


def change(
    gate: Gate,
    now: Signals,
    scale: Signals,
    stored: Sequence[Signals],
    row: Tensor | None,
) -> Tensor:
    """The change that a gate looks at, a scalar in fp32 (fp64 for fp64 signals).

    Args:
        gate: which change.
        now: this call's signals, one per stream: the first blocks' residuals, or the stack's
            inputs.
        scale: the first blocks' outputs, which the error of a prediction is relative to.
        stored: the same signals at full calls, newest first.
        row: the forecast's coefficients, for a prediction.
    """
    numerator, denominator = _zero(now[0]), _zero(now[0])
    for position, value in enumerate(now):
        wide = _wide(value)
        reference = stored[0][position].to(wide)
        against = reference
        if gate.kind == "prediction":
            assert row is not None
            history = [signals[position].to(wide) for signals in stored]
            reference = forecast(None, history, row.to(wide))
            against = scale[position].to(wide)
        numerator = numerator + (value.to(wide) - reference).abs().sum()
        denominator = denominator + against.abs().sum()
    return numerator / denominator


def read(value: Tensor, group: str | None) -> float:
    """The change on the host, the largest one of all ranks; waits for the device.

    A NaN on any rank is infinite on all of them.
    """
    if group is not None:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        ranks = distributed_c10d._resolve_process_group(cast("Any", group))  # type: ignore[attr-defined]
        value = torch.nan_to_num(value, nan=math.inf, posinf=math.inf)
        dist.all_reduce(value, dist.ReduceOp.MAX, ranks)
    return float(value)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=_wide(like), device=like.device)
