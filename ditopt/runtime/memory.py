"""How much memory the stored residuals of a schedule take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ditopt.runtime.schedule import StepSchedule


def cache_bytes(
    schedule: StepSchedule,
    outputs: Iterable[tuple[Sequence[int], torch.dtype]],
    signals: Iterable[tuple[Sequence[int], torch.dtype]] = (),
) -> int:
    """Largest number of bytes that one sampling run keeps in stored residuals.

    A residual lives from its full call to the last skip call that reads it; with a gate, which may
    make any call full, the newest ones are kept until the last skip call. Every guidance branch has
    its own. Each further run in progress takes as much again.

    Args:
        schedule: the plan's calls.
        outputs: shape and dtype of each output of the block stack, for one branch.
        signals: the same of what a gate compares: the first blocks' streams, or the stack's inputs.
    """
    one_call = sum(math.prod(shape) * dtype.itemsize for shape, dtype in (*outputs, *signals))
    if schedule.gate is not None:
        return schedule.kept * one_call * schedule.branches
    lives = schedule.last_use.items()
    alive = (sum(full <= call <= last for full, last in lives) for call in range(schedule.calls))
    return max(alive) * one_call * schedule.branches
