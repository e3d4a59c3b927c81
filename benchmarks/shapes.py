"""Diffusion Transformers of published shape with random weights, and one denoiser call for each.

Weights are random, so these serve speed, memory and capture only; no quality can be read off them.
`tiny=True` gives the same architectures with two narrow layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One model at one resolution.

    Attributes:
        title: for tables.
        cls: name of the diffusers class.
        config: arguments of the class, as published.
        tiny: what differs in the tiny variant.
        inputs: (tiny, device, dtype) -> arguments of one call of the denoiser.
        tokens: sequence length of the self or joint attention.
    """

    title: str
    cls: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    inputs: Callable[[bool, torch.device, torch.dtype], Inputs]
    tokens: int


def _dit_inputs(tiny: bool, device: torch.device, dtype: torch.dtype) -> Inputs:
    batch, size = (2, 8) if tiny else (8, 64)
    return {
        "hidden_states": torch.randn(batch, 4, size, size, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": torch.arange(batch, device=device),
    }


def _flux_inputs(tiny: bool, device: torch.device, dtype: torch.dtype) -> Inputs:
    side, text = (8, 12) if tiny else (64, 512)
    channels, joint, pooled = (4, 32, 32) if tiny else (64, 4096, 768)
    ids = torch.zeros(side * side, 3, device=device, dtype=dtype)
    ids[:, 1] = torch.arange(side, device=device).repeat_interleave(side)
    ids[:, 2] = torch.arange(side, device=device).repeat(side)
    # 0.5 and 4.0 stay exact when the model multiplies them by 1000 in bf16: all variants, and the
    # float32 oracle, then embed the same timestep.
    return {
        "hidden_states": torch.randn(1, side * side, channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, joint, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, pooled, device=device, dtype=dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 4.0, device=device, dtype=torch.float32),
    }


def _wan_inputs(tiny: bool, device: torch.device, dtype: torch.dtype) -> Inputs:
    latent, text, width = ((3, 8, 8), 12, 32) if tiny else ((21, 60, 104), 512, 4096)
    return {
        "hidden_states": torch.randn(1, 16, *latent, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, text, width, device=device, dtype=dtype),
    }


def _pixart_inputs(tiny: bool, device: torch.device, dtype: torch.dtype) -> Inputs:
    size, text, width = (8, 12, 32) if tiny else (128, 300, 4096)
    mask = torch.zeros(2, text, device=device, dtype=dtype)
    mask[:, : text // 3] = 1
    return {
        "hidden_states": torch.randn(2, 4, size, size, device=device, dtype=dtype),
        "timestep": torch.full((2,), 500, device=device),
        "encoder_hidden_states": torch.randn(2, text, width, device=device, dtype=dtype),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


SHAPES: dict[str, Shape] = {
    # facebook/DiT-XL-2-512, transformer/config.json
    "dit-xl": Shape(
        title="DiT-XL/2, 512 x 512, batch 8",
        cls="DiTTransformer2DModel",
        config={
            "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
            "out_channels": 8, "attention_bias": True, "sample_size": 64, "patch_size": 2,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5,
        },
        tiny={
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
            "num_embeds_ada_norm": 8,
        },
        inputs=_dit_inputs,
        tokens=1024,
    ),
    # black-forest-labs/FLUX.1-dev, transformer/config.json
    "flux": Shape(
        title="FLUX.1-dev, 1024 x 1024",
        cls="FluxTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        tiny={
            "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        inputs=_flux_inputs,
        tokens=4096 + 512,
    ),
    # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, transformer/config.json
    "pixart": Shape(
        title="PixArt-Sigma-XL/2, 1024 x 1024, batch 2",
        cls="PixArtTransformer2DModel",
        config={
            "num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "in_channels": 4,
            "out_channels": 8, "cross_attention_dim": 1152, "attention_bias": True,
            "sample_size": 128, "patch_size": 2, "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "interpolation_scale": 2,
            "caption_channels": 4096, "use_additional_conditions": False,
        },
        tiny={
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
            "cross_attention_dim": 32, "caption_channels": 32,
        },
        inputs=_pixart_inputs,
        tokens=4096,
    ),
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json
    "wan": Shape(
        title="Wan2.1-T2V-1.3B, 480 x 832, 81 frames",
        cls="WanTransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128,
            "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
            "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
        },
        tiny={
            "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32,
            "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
        },
        inputs=_wan_inputs,
        tokens=21 * 30 * 52,
    ),
}  # fmt: skip


def build(name: str, device: torch.device, *, tiny: bool = False) -> tuple[nn.Module, Inputs]:
    """The model in bf16, as `from_pretrained` would load it, and the arguments of one call."""
    import diffusers

    shape = SHAPES[name]
    torch.manual_seed(0)
    with device:
        model = getattr(diffusers, shape.cls)(**shape.config | (shape.tiny if tiny else {}))
    _to_bfloat16(model)
    model.eval().requires_grad_(False)
    return model, shape.inputs(tiny, device, torch.bfloat16) | {"return_dict": False}


def _to_bfloat16(model: nn.Module) -> None:
    """bf16, except where the class keeps float32 (Wan's norms, time embedder and modulation)."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()


def upcast(inputs: Inputs) -> Inputs:
    """The same inputs with floating-point tensors in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
