"""The tiny video model as a ditopt workload: `ditopt profile examples/tiny_video/workload.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# ditopt loads a workload by its path, outside of any package: let it find `tiny_video`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_video.sampler import (
    GUIDANCE,
    STEPS,
    Denoiser,
    conditions_of,
    denoise,
    guided_conditions,
    load_checkpoint,
    to_frames,
)

if TYPE_CHECKING:
    from ditopt.workload import Workload


def workload(
    device: str | None = None,
    dtype: torch.dtype | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Workload:
    """The trained model with its sampler.

    Args:
        device: a GPU where there is one, by default.
        dtype: of the weights and the model's inputs; bf16 on a GPU, fp32 on the CPU by default.
        steps: calls of the model per clip.
        guidance: weight of the prompt over the null prompt.
    """
    from ditopt.workload import Workload

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    model, conditions = load_checkpoint(device=device, dtype=dtype)

    def sample(model: Denoiser, seed: int) -> Tensor:
        """A clip fp32 [F, 3, H, W] in [-1, 1]; the seed chooses noise, scene and motion."""
        tokens = guided_conditions(conditions, *conditions_of(seed))
        return denoise(model, tokens, seed, steps, guidance)

    return Workload(model, sample, frames=to_frames, data_range=2.0, name="tiny_video")
