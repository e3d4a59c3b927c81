"""`Signals`: what the rules of published step caches look at, recorded on runs without skips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ditopt.errors import ProfileError


@dataclass(frozen=True)
class Signals:
    """Means over recorded runs; every rule decides offline from these.

    Attributes:
        modulated: [T] relative L1 change of the first block's modulated input since the call
            before; entry 0 is 0.
        output: [T] the same of the block stack's residual.
        first_block: [T, T] relative L1 change of the first block's residual from call s to call t
            at [s, t].
        stack: [T, T] the same of the whole stack's residual.
        magnitudes: [T] mean over tokens of the residual's norm over that of the call before; entry
            0 is 1.
    """

    modulated: tuple[float, ...]
    output: tuple[float, ...]
    first_block: Tensor
    stack: Tensor
    magnitudes: tuple[float, ...]

    @property
    def calls(self) -> int:
        """T."""
        return len(self.modulated)

    def polynomial(self, degree: int) -> tuple[float, ...]:
        """Least squares from the input's change to the output's, highest power first.

        TeaCache (arXiv 2411.19108, section 3.3) fits degree 4.
        """
        fit = np.polyfit(self.modulated[1:], self.output[1:], min(degree, self.calls - 2))
        return tuple(fit.tolist())

    @classmethod
    def of_runs(cls, runs: Sequence[RunSignals]) -> Signals:
        """The mean over runs."""
        if not runs:
            raise ProfileError("no run was recorded, expected at least one")
        one = [run.finish() for run in runs]

        def mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
            return tuple(np.mean(rows, axis=0).tolist())

        return cls(
            modulated=mean([signals.modulated for signals in one]),
            output=mean([signals.output for signals in one]),
            first_block=torch.stack([signals.first_block for signals in one]).mean(0),
            stack=torch.stack([signals.stack for signals in one]).mean(0),
            magnitudes=mean([signals.magnitudes for signals in one]),
        )


class RunSignals:
    """Takes what one run shows, call by call; it keeps every tensor that it is given."""

    def __init__(self) -> None:
        self._modulated: list[Tensor] = []
        self._first_block: list[Tensor] = []
        self._stack: list[Tensor] = []

    def add(self, modulated: Tensor, first_block: Tensor, stack: Tensor) -> None:
        """Record one call.

        Args:
            modulated: the first block's input after norm and timestep modulation.
            first_block: output minus input of the first block [B, N, D].
            stack: output minus input of the block stack [B, N, D].
        """
        self._modulated.append(modulated.detach().clone())
        self._first_block.append(first_block.detach().clone())
        self._stack.append(stack.detach().clone())

    def finish(self) -> Signals:
        """The signals of this run."""
        return Signals(
            modulated=_steps(self._modulated),
            output=_steps(self._stack),
            first_block=_changes(self._first_block),
            stack=_changes(self._stack),
            magnitudes=(
                1.0,
                *(
                    float((now.float().norm(dim=-1) / then.float().norm(dim=-1)).mean())
                    for then, now in pairwise(self._stack)
                ),
            ),
        )


def relative_l1(now: Tensor, then: Tensor) -> float:
    """`mean|now - then| / mean|then|`; NaN where both are zero."""
    return float((now.float() - then.float()).abs().mean() / then.float().abs().mean())


def _steps(tensors: Sequence[Tensor]) -> tuple[float, ...]:
    return (0.0, *(relative_l1(now, then) for then, now in pairwise(tensors)))


def _changes(tensors: Sequence[Tensor]) -> Tensor:
    rows = [[relative_l1(now, then) for now in tensors] for then in tensors]
    return torch.tensor(rows, dtype=torch.float64)
