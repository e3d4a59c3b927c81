"""The embedded model's sampler for several seeds as one batch: many more samples a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import itertools

from tiny_video.data import FRAMES, SIZE
from tiny_video.sampler import (
    GUIDANCE,
    STEPS,
    conditions_of,
    guided_conditions,
    load_checkpoint,
    shift_times,
)

Shape = tuple[int, int, int, int]
CLIP: Shape = (3, FRAMES, SIZE, SIZE)


@torch.no_grad()
def sample_together(
    model: torch.nn.Module, seeds: Sequence[int], denoiser: Callable[..., Any], shape: Shape = CLIP
) -> list[Tensor]:
    """As the workload's own `sample` for each seed, up to rounding.

    Args:
        model: the embedded model; says device and dtype.
        seeds: of the clips.
        denoiser: the model, or what stands for it.
        shape: channels, frames, rows and columns of a clip.
    """
    parameter = next(model.parameters())
    _, conditions = load_checkpoint(device=parameter.device, dtype=parameter.dtype)
    pairs = [guided_conditions(conditions, *conditions_of(seed)) for seed in seeds]
    tokens = torch.cat([torch.stack([pair[i] for pair in pairs]) for i in (0, 1)])
    noises = [
        torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    state = torch.cat(noises).to(parameter.device)
    times = shift_times(torch.linspace(1, 0, STEPS + 1)).tolist()
    for time, after in itertools.pairwise(times):
        velocity = denoiser(
            hidden_states=state.to(parameter.dtype).repeat(2, 1, 1, 1, 1),
            timestep=torch.full((2 * len(seeds),), 1000 * time, device=parameter.device),
            encoder_hidden_states=tokens,
        ).float()
        prompt, null = velocity.chunk(2)
        state = state + (after - time) * (null + GUIDANCE * (prompt - null))
    return list(state.transpose(1, 2).clamp(-1, 1))
