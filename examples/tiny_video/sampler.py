"""Checkpoint and denoising loop of the tiny video model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data import FRAMES, MOTIONS, SCENES, SIZE
from .model import ConditionEmbedding, VideoDiT

CHECKPOINT = Path(__file__).parent / "checkpoint.safetensors"
STEPS = 20
GUIDANCE = 2.0
SHIFT = 3.0  # neighbouring pixels agree, so a clip shows through noise that would hide one pixel

Denoiser = Callable[..., Tensor]


def shift_times(t: Tensor) -> Tensor:
    """Move times in [0, 1] towards the noise end (1), as training and sampling both do."""
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def conditions_of(seed: int) -> tuple[int, int]:
    """Scene and motion of a seed: 0..7 show each scene and each motion, 0..63 every pair."""
    return seed % len(SCENES), (seed + seed // len(SCENES)) % len(MOTIONS)


def save_checkpoint(model: VideoDiT, conditions: ConditionEmbedding, path: Path) -> None:
    """Write the weights of both modules as bf16 safetensors."""
    modules = {"model": model, "conditions": conditions}
    tensors = {
        f"{prefix}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, path)


def load_checkpoint(
    path: Path = CHECKPOINT, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[VideoDiT, ConditionEmbedding]:
    """The trained model and its condition embedding, in evaluation mode and without gradients."""
    tensors = load_file(path)
    pair = VideoDiT(), ConditionEmbedding(len(SCENES), len(MOTIONS))
    for module, prefix in zip(pair, ("model.", "conditions."), strict=True):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(own)
        module.to(device, dtype).eval().requires_grad_(False)
    return pair


def guided_conditions(conditions: ConditionEmbedding, scene: int, motion: int) -> Tensor:
    """Condition tokens [2, L, width] of a prompt and of the null prompt, as `denoise` wants."""
    device = conditions.scene.weight.device
    scenes = torch.tensor([scene, conditions.null_scene], device=device)
    motions = torch.tensor([motion, conditions.null_motion], device=device)
    return conditions(scenes, motions)


@torch.no_grad()
def denoise(
    model: Denoiser,
    encoder_hidden_states: Tensor,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    shape: tuple[int, int, int, int] = (3, FRAMES, SIZE, SIZE),
) -> Tensor:
    """Euler integration of the flow from noise to a clip, fp32 [F, 3, H, W] in [-1, 1].

    Prompt and null prompt go through the model as one batch of two, one call per step. The state
    stays in fp32; the model sees it in the dtype of the condition tokens. Noise is drawn on the
    CPU, so that a seed means the same clip on every device.

    Args:
        model: the denoiser, or a callable in its place.
        encoder_hidden_states: what `guided_conditions` returns; the same tensor for all calls.
        seed: seed of the noise.
        steps: calls of the model.
        guidance: weight of the prompt over the null prompt; 1 is no guidance.
        shape: channels, frames, rows and columns of the clip.
    """
    device, dtype = encoder_hidden_states.device, encoder_hidden_states.dtype
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    state = noise.to(device)
    times = shift_times(torch.linspace(1, 0, steps + 1))
    for time, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        velocity = model(
            hidden_states=state.to(dtype).expand(2, *shape).contiguous(),
            timestep=torch.full((2,), 1000 * time, device=device),
            encoder_hidden_states=encoder_hidden_states,
        ).float()
        prompt, null = velocity.chunk(2)
        state = state + (after - time) * (null + guidance * (prompt - null))
    return state[0].transpose(0, 1).clamp(-1, 1)


def to_frames(clip: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[F, 3, H, W] in [-1, 1] -> uint8 pictures [F, H, W, 3]."""
    levels = ((clip.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
