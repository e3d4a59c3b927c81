"""How far each call of the model moves the sampled tensor: what an error at that call is worth.

Samplers are unknown, but x_{t+1} - x_t is seen at the model's own inputs. A solver applies the
model's output in proportion to its step, so a relative error r of the output at call t changes the
sample by about r * |x_{t+1} - x_t|, whatever the prediction type and the solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ditopt.calls import Call, CallTrace


class StepEnergy:
    """Accumulates the mean squared change of the latent over one sampling loop."""

    def __init__(self, trace: CallTrace) -> None:
        self._name = _latent_name(trace)
        self._latents: list[Tensor | None] = [None] * trace.calls_per_branch

    def add(self, call: Call, inputs: Mapping[str, Any]) -> None:
        """Note the latent that a call receives; all branches of a step receive the same."""
        if self._name is not None:
            latent = inputs.get(self._name)
            if latent is not None:
                self._latents[call.index] = latent.detach().float().cpu().clone()

    def finish(self) -> Tensor:
        """[T] mean squares; the last call's step is not seen and counts like the one before it.

        Without a recognisable latent every call counts 1.
        """
        known = [latent for latent in self._latents if latent is not None]
        energy = torch.ones(len(self._latents), dtype=torch.float64)
        if len(known) < len(self._latents) or len(known) < 2:
            return energy
        for t in range(len(known) - 1):
            energy[t] = (known[t + 1] - known[t]).double().square().mean()
        energy[-1] = energy[-2]
        return energy


def _latent_name(trace: CallTrace) -> str | None:
    """The varying tensor input with most values, other than the timestep."""
    sizes = {
        name: torch.Size(trace.shapes[name]).numel()
        for name in trace.varying
        if name != trace.timestep and name in trace.shapes
    }
    return max(sizes, key=lambda name: sizes[name], default=None)
