"""The larger video model with its sampler; train it first (train.py): no checkpoint is stored.

    ditopt profile examples/wan_video/workload.py -o prof/

Tokens: 16 frames of 128 x 128 pixels in patches of 1 x 4 x 4 are 16 x 32 x 32 = 16,384.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_video.data import MOTIONS, SCENES
from tiny_video.model import ConditionEmbedding
from tiny_video.sampler import conditions_of, denoise, guided_conditions, to_frames

if TYPE_CHECKING:
    from ditopt.workload import Workload

FRAMES, SIZE = 16, 128
STEPS, GUIDANCE = 30, 2.0
CHECKPOINT = "WAN_VIDEO_CHECKPOINT"
"""Variable with the checkpoint's path; beside this file by default."""

WIDTH = 256
"""Of the condition tokens."""

CONFIG: dict[str, Any] = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 5,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": WIDTH,
    "freq_dim": 256,
    "ffn_dim": 1280,
    "num_layers": 8,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


def build() -> tuple[nn.Module, ConditionEmbedding]:
    """Model and condition embedding with random weights; diffusers has the class."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIG), ConditionEmbedding(
        len(SCENES), len(MOTIONS), width=WIDTH
    )


def save_checkpoint(model: nn.Module, conditions: nn.Module, path: Path) -> None:
    """Write the weights of both modules as bf16 safetensors."""
    pairs = (("model", model), ("conditions", conditions))
    tensors = {
        f"{prefix}.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for prefix, module in pairs
        for name, value in module.state_dict().items()
    }
    save_file(tensors, path)


def load_checkpoint(
    path: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[nn.Module, ConditionEmbedding]:
    """The trained pair, in evaluation mode and without gradients."""
    tensors = load_file(path)
    pair = build()
    for module, prefix in zip(pair, ("model.", "conditions."), strict=True):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(own)
        module.to(device, dtype).eval().requires_grad_(False)
    return pair


def velocity_of(model: Any) -> Any:
    """The model's result as a tensor, as the sampler wants it."""

    def velocity(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        result: Tensor = model(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            return_dict=False,
        )[0]
        return result

    return velocity


def workload() -> Workload:
    """bf16 on a GPU, fp32 on a CPU.

    Raises:
        FileNotFoundError: there is no checkpoint; says how to train one.
    """
    from ditopt.workload import Workload

    path = Path(os.environ.get(CHECKPOINT, Path(__file__).parent / "checkpoint.safetensors"))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: train the model first (cd examples && python -m wan_video.train --out DIR) "
            f"and name the checkpoint in {CHECKPOINT}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, conditions = load_checkpoint(path, device, dtype)

    def sample(denoiser: Any, seed: int) -> Tensor:
        """A clip fp32 [F, 3, H, W] in [-1, 1]."""
        tokens = guided_conditions(conditions, *conditions_of(seed))
        shape = (3, FRAMES, SIZE, SIZE)
        return denoise(velocity_of(denoiser), tokens, seed, STEPS, GUIDANCE, shape)

    return Workload(model, sample, frames=to_frames, data_range=2.0, name="wan_video")
