"""Tiny diffusers transformers with random weights: published architectures for a CPU.

`build("flux")` gives a model in eval mode and the arguments of one call, and
`kwargs_for("flux", hw=(4, 6), t=300)` the arguments of another. Everything is seeded. `hw` is the
latent's height and width, multiples of the patch size; one number means a square. Results are
tuples (`return_dict=False`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[["Call"], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """What one call of a model is about: latent size, timestep (0 to 1000), batch."""

    height: int
    width: int
    t: float
    batch: int

    @property
    def tokens(self) -> int:
        """Latent pixels of one frame."""
        return self.height * self.width

    def noise(self, *shape: int) -> Tensor:
        """Normal noise [batch, *shape]."""
        return torch.randn(self.batch, *shape)

    def image(self, channels: int = 4) -> Tensor:
        """A latent image [B, C, H, W]."""
        return self.noise(channels, self.height, self.width)

    def timestep(self, scale: float = 1.0) -> Tensor:
        """[B] the timestep times `scale`, in floating point."""
        return torch.full((self.batch,), self.t * scale)

    def integer_timestep(self) -> Tensor:
        """[B] the timestep as an integer."""
        return self.timestep().long()


@dataclass(frozen=True)
class Case:
    """One architecture: its diffusers class, a tiny configuration and its inputs.

    Attributes:
        family: how attention is laid out.
    """

    name: str
    cls: str
    family: str
    config: dict[str, Any]
    inputs: Inputs
    hw: int = 8


ZOO: dict[str, Case] = {}


def _case(name: str, cls: str, family: str, **config: Any) -> Callable[[Inputs], Inputs]:
    def register(inputs: Inputs) -> Inputs:
        ZOO[name] = Case(name, cls, family, config, inputs)
        return inputs

    return register


def build(
    name: str,
    *,
    hw: int | tuple[int, int] | None = None,
    t: float = 700.0,
    batch: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A seeded model of the zoo in eval mode, without gradients, and the arguments of one call."""
    import diffusers
    from diffusers.models import transformers

    case = ZOO[name]
    cls = getattr(diffusers, case.cls, None) or getattr(transformers, case.cls)
    torch.manual_seed(seed)
    model: nn.Module = cls(**{**case.config, **overrides}).eval().requires_grad_(False)
    # Some models start with zeros in their output layers; here every parameter has to matter.
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.any():
            parameter.normal_(std=0.02)
    return model, kwargs_for(name, hw=hw, t=t, batch=batch, seed=seed)


def kwargs_for(
    name: str,
    *,
    hw: int | tuple[int, int] | None = None,
    t: float = 700.0,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments of one call of a model of the zoo."""
    case = ZOO[name]
    height, width = hw if isinstance(hw, tuple) else (hw or case.hw,) * 2
    torch.manual_seed(seed + 1)
    return {**case.inputs(Call(height, width, t, batch)), "return_dict": False}


def first_tensor(result: Any) -> Tensor:
    """The tensor that a model's result begins with."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def _ones_then_zeros(batch: int, length: int, ones: int) -> Tensor:
    mask = torch.zeros(batch, length)
    mask[:, :ones] = 1
    return mask


def _raster_ids(call: Call, axes: int = 3) -> Tensor:
    """[H W, axes] position ids: axis 1 is the row, axis 2 the column, the others are 0."""
    ids = torch.zeros(call.tokens, axes)
    ids[:, 1] = torch.arange(call.height).repeat_interleave(call.width)
    ids[:, 2] = torch.arange(call.width).repeat(call.height)
    return ids


# ---- images: self-attention, and cross-attention to text ----


@_case(
    "dit", "DiTTransformer2DModel", "self",
    in_channels=4, out_channels=8, activation_fn="gelu-approximate", num_attention_heads=2,
    attention_head_dim=16, attention_bias=True, num_layers=2, norm_type="ada_norm_zero",
    num_embeds_ada_norm=8, patch_size=2, sample_size=8,
)  # fmt: skip
def _dit(call: Call) -> dict[str, Any]:
    labels = torch.zeros(call.batch, dtype=torch.long)
    return {
        "hidden_states": call.image(),
        "timestep": call.integer_timestep(),
        "class_labels": labels,
    }


@_case(
    "pixart", "PixArtTransformer2DModel", "self + cross",
    sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2,
    in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True,
    activation_fn="gelu-approximate", num_embeds_ada_norm=8, norm_type="ada_norm_single",
    norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
    caption_channels=None,
)  # fmt: skip
def _pixart(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.image(),
        "timestep": call.integer_timestep(),
        "encoder_hidden_states": call.noise(8, 32),
        "encoder_attention_mask": _ones_then_zeros(call.batch, 8, 6),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@_case(
    "sana", "SanaTransformer2DModel", "linear self + cross",
    patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
    cross_attention_dim=32, caption_channels=8, sample_size=8,
)  # fmt: skip
def _sana(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.image(),
        "timestep": call.integer_timestep(),
        "encoder_hidden_states": call.noise(8, 8),
    }


# ---- images: text and image in one softmax ----


@_case(
    "sd3", "SD3Transformer2DModel", "joint",
    sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
    num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=32,
    pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32, dual_attention_layers=(0,),
    qk_norm="rms_norm",
)  # fmt: skip
def _sd3(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.image(),
        "encoder_hidden_states": call.noise(12, 32),
        "pooled_projections": call.noise(64),
        "timestep": call.integer_timestep(),
    }


_FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
}  # fmt: skip


def _flux_inputs(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.noise(call.tokens, 4),
        "encoder_hidden_states": call.noise(12, 32),
        "img_ids": _raster_ids(call),
        "txt_ids": torch.zeros(12, 3),
        "timestep": call.timestep(1e-3),
    }


@_case(
    "flux", "FluxTransformer2DModel", "joint + single stream",
    pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=[4, 4, 8], **_FLUX,
)  # fmt: skip
def _flux(call: Call) -> dict[str, Any]:
    guidance = torch.full((call.batch,), 3.5)
    return {**_flux_inputs(call), "pooled_projections": call.noise(32), "guidance": guidance}


@_case(
    "flux2", "Flux2Transformer2DModel", "joint + single stream",
    timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4], **_FLUX,
)  # fmt: skip
def _flux2(call: Call) -> dict[str, Any]:
    txt_ids = torch.zeros(12, 4)
    txt_ids[:, 3] = torch.arange(12)
    return {
        **_flux_inputs(call),
        "img_ids": _raster_ids(call, 4).expand(call.batch, -1, -1),
        "txt_ids": txt_ids.expand(call.batch, -1, -1),
        "guidance": torch.full((call.batch,), 3.5),
    }


@_case(
    "chroma", "ChromaTransformer2DModel", "joint + single stream, masked",
    approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    axes_dims_rope=[4, 4, 8], **_FLUX,
)  # fmt: skip
def _chroma(call: Call) -> dict[str, Any]:
    mask = torch.ones(call.batch, 12 + call.tokens)
    mask[:, 10:12] = 0
    return {**_flux_inputs(call), "attention_mask": mask}


@_case(
    "qwen_image", "QwenImageTransformer2DModel", "joint",
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
)  # fmt: skip
def _qwen_image(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.noise(call.tokens, 16),
        "encoder_hidden_states": call.noise(8, 16),
        "encoder_hidden_states_mask": torch.ones(call.batch, 8, dtype=torch.long),
        "timestep": call.timestep(1e-3),
        "img_shapes": [(1, call.height, call.width)] * call.batch,
    }


@_case(
    "hidream", "HiDreamImageTransformer2DModel", "joint + single stream, mixture of experts",
    patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
    attention_head_dim=8, num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8,
    num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
    max_resolution=(16, 16), llama_layers=(0, 1), force_inference_output=True,
)  # fmt: skip
def _hidream(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.image(),
        "timesteps": call.integer_timestep(),
        "encoder_hidden_states_t5": call.noise(8, 8),
        "encoder_hidden_states_llama3": torch.randn(2, call.batch, 8, 4),
        "pooled_embeds": call.noise(8),
    }


@_case(
    "cogview4", "CogView4Transformer2DModel", "joint",
    patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=4,
)  # fmt: skip
def _cogview4(call: Call) -> dict[str, Any]:
    pixels = torch.tensor([[call.height * 8.0, call.width * 8.0]] * call.batch)
    return {
        "hidden_states": call.image(),
        "encoder_hidden_states": call.noise(8, 8),
        "timestep": call.integer_timestep(),
        "original_size": pixels,
        "target_size": pixels,
        "crop_coords": torch.zeros(call.batch, 2),
    }


# ---- images: one stream, as in a language model ----


@_case(
    "lumina2", "Lumina2Transformer2DModel", "single stream, grouped queries",
    sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
    num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5,
    scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32,
)  # fmt: skip
def _lumina2(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.image(),
        "encoder_hidden_states": call.noise(12, 32),
        "timestep": call.timestep(1e-3),
        "encoder_attention_mask": torch.ones(call.batch, 12, dtype=torch.bool),
    }


@_case(
    "z_image", "ZImageTransformer2DModel", "single stream",
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2,
    n_refiner_layers=1, n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16, rope_theta=256.0,
    t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
)  # fmt: skip
def _z_image(call: Call) -> dict[str, Any]:
    return {
        "x": [torch.randn(4, 1, call.height, call.width) for _ in range(call.batch)],
        "t": call.timestep(1e-3),
        "cap_feats": [torch.randn(12, 16) for _ in range(call.batch)],
    }


@_case(
    "omnigen", "OmniGenTransformer2DModel", "single stream",
    hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
    num_layers=2, pad_token_id=0, vocab_size=100, in_channels=4, time_step_dim=4,
    rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
)  # fmt: skip
def _omnigen(call: Call) -> dict[str, Any]:
    length = 6 + 1 + (call.height // 2) * (call.width // 2)  # prompt, timestep, patches
    return {
        "hidden_states": call.image(),
        "timestep": call.timestep(1e-3),
        "input_ids": torch.randint(0, 10, (call.batch, 6)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(call.batch, length, length),
        "position_ids": torch.arange(length).expand(call.batch, -1),
    }


# ---- videos ----

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def _video(call: Call, frames: int = 2, text: tuple[int, int] = (12, 16)) -> dict[str, Any]:
    return {
        "hidden_states": call.noise(4, frames, call.height, call.width),
        "timestep": call.integer_timestep(),
        "encoder_hidden_states": call.noise(*text),
    }


@_case("wan", "WanTransformer3DModel", "self + cross", **_WAN)
def _wan(call: Call) -> dict[str, Any]:
    return _video(call)


@_case(
    "wan_i2v",
    "WanTransformer3DModel",
    "self + cross + image cross",
    image_dim=8,
    added_kv_proj_dim=24,
    **_WAN,
)
def _wan_i2v(call: Call) -> dict[str, Any]:
    return {**_video(call), "encoder_hidden_states_image": call.noise(5, 8)}


@_case(
    "hunyuan_video", "HunyuanVideoTransformer3DModel", "joint + single stream, masked",
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
    num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
    text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), image_condition_type=None,
)  # fmt: skip
def _hunyuan_video(call: Call) -> dict[str, Any]:
    return {
        **_video(call),
        "pooled_projections": call.noise(8),
        "encoder_attention_mask": torch.ones(call.batch, 12),
        "guidance": torch.full((call.batch,), 3500.0),
    }


@_case(
    "hunyuan_video15", "HunyuanVideo15Transformer3DModel", "joint, masked",
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
    num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16,
    text_embed_2_dim=8, image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16,
    task_type="t2v",
)  # fmt: skip
def _hunyuan_video15(call: Call) -> dict[str, Any]:
    return {
        **_video(call, frames=1, text=(6, 16)),
        "timestep": call.timestep(),
        "encoder_hidden_states_2": call.noise(4, 8),
        "encoder_attention_mask": torch.ones(call.batch, 6),
        "encoder_attention_mask_2": torch.ones(call.batch, 4),
        "image_embeds": torch.zeros(call.batch, 3, 12),
    }


@_case(
    "cogvideox", "CogVideoXTransformer3DModel", "single stream, norms apart",
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
    text_embed_dim=8, num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2,
    temporal_compression_ratio=4, max_text_seq_length=8, use_rotary_positional_embeddings=True,
)  # fmt: skip
def _cogvideox(call: Call) -> dict[str, Any]:
    tokens = 2 * (call.height // 2) * (call.width // 2)
    return {
        "hidden_states": call.noise(2, 4, call.height, call.width),
        "encoder_hidden_states": call.noise(8, 8),
        "timestep": call.integer_timestep(),
        "image_rotary_emb": (torch.randn(tokens, 16), torch.randn(tokens, 16)),
    }


@_case(
    "ltx", "LTXVideoTransformer3DModel", "self + cross",
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
    cross_attention_dim=32, num_layers=2, qk_norm="rms_norm_across_heads", caption_channels=16,
)  # fmt: skip
def _ltx(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.noise(2 * call.tokens, 4),
        "encoder_hidden_states": call.noise(12, 16),
        "timestep": call.integer_timestep(),
        "encoder_attention_mask": torch.ones(call.batch, 12, dtype=torch.bool),
        "num_frames": 2,
        "height": call.height,
        "width": call.width,
    }


@_case(
    "mochi", "MochiTransformer3DModel", "joint, masked",
    patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
    pooled_projection_dim=16, in_channels=4, out_channels=None, qk_norm="rms_norm",
    text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=16,
)  # fmt: skip
def _mochi(call: Call) -> dict[str, Any]:
    return {**_video(call), "encoder_attention_mask": _ones_then_zeros(call.batch, 12, 10).bool()}


@_case(
    "latte", "LatteTransformer3DModel", "spatial self + cross, temporal self",
    sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2,
    caption_channels=8, in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True,
    activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
    norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
)  # fmt: skip
def _latte(call: Call) -> dict[str, Any]:
    return {**_video(call, text=(8, 8)), "enable_temporal_attentions": True}


@_case(
    "sana_video", "SanaVideoTransformer3DModel", "linear self + cross",
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
    num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
    caption_channels=16, mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2),
    qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
def _sana_video(call: Call) -> dict[str, Any]:
    return _video(call)
