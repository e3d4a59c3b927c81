"""Which stored residuals a skip call combines, and with which coefficients."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ditopt.runtime.schedule import StepSchedule

Sources = tuple[tuple[int, float], ...]
"""(full call, coefficient), newest first."""


def sources_of(schedule: StepSchedule, call: int, stored: Collection[int]) -> Sources | None:
    """What a skip call combines; None where residuals that the plan counts on are missing.

    The plan's row holds for the full calls that the plan foresees; a fitted row holds for nothing
    else. Where a gate has run further calls in full, the newest residuals are nearer than those,
    and the row is the polynomial through the newest `gate.order + 1` of them, at their true
    distances: Newton's form, in fp64, of a lower order where magnitudes would sum to more than
    `MAX_GAIN`.
    """
    planned = schedule.sources[call]
    if schedule.gate is None:
        return planned if all(source in stored for source, _ in planned) else None
    newest = sorted((source for source in stored if source < call), reverse=True)
    expected = schedule.full_before(call)
    if not newest or newest[0] < expected[0]:
        return None
    length = len(schedule.coefficients[call])
    if newest[:length] == list(expected[:length]):
        return planned
    return polynomial(call, newest[: schedule.gate.order + 1])


def polynomial(call: int, newest: list[int]) -> Sources:
    """Extrapolation to a call through the residuals of others, all of them where that is tame."""
    # Planning is not needed to run a plan, so it is imported where a gate has changed one.
    from ditopt.caching.rows import newton_row
    from ditopt.runtime.schedule import MAX_GAIN

    for length in range(len(newest), 0, -1):
        row = newton_row(float(call), [float(source) for source in newest[:length]])
        if math.fsum(map(abs, row)) <= MAX_GAIN:
            break
    return tuple(zip(newest, row, strict=False))


class Rows:
    """Coefficients as tensors, each copied to a device once."""

    def __init__(self, schedule: StepSchedule) -> None:
        planned = (tuple(c for _, c in sources) for sources in schedule.sources)
        self._planned = tuple(dict.fromkeys(row for row in planned if row))
        self._rows: dict[tuple[Any, ...], Tensor] = {}

    def like(self, residual: Tensor, row: tuple[float, ...]) -> Tensor:
        """[k] a row on a residual's device, in fp32 (fp64 for fp64 residuals)."""
        where = residual.device, torch.promote_types(residual.dtype, torch.float32)
        if (*where, row) not in self._rows:
            # With the first one all that the plan foresees: no later call waits for a copy.
            missing = [r for r in {*self._planned, row} if (*where, r) not in self._rows]
            flat = torch.tensor([c for r in missing for c in r], dtype=where[1]).to(where[0])
            parts = flat.split_with_sizes([len(r) for r in missing])
            self._rows.update({(*where, r): part for r, part in zip(missing, parts, strict=True)})
        return self._rows[*where, row]
