"""A small video Diffusion Transformer in plain PyTorch.

Shape symbols: B batch, C channels, F frames, H x W pixels, N = F * (H/4) * (W/4) video tokens in
raster order (frame, row, column), L condition tokens, D model width. With clips of 8 x 64 x 64
pixels, N is 8 x 16 x 16 = 2,048.

The layout is that of today's video models at a size that a laptop can run: Conv3d patches, full
self-attention over space and time with 3D rotary positions, cross-attention to condition tokens,
timestep modulation shared by all blocks (adaLN-single).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a `VideoDiT`; the defaults are those of the shipped checkpoint."""

    channels: int = 3
    patch: tuple[int, int, int] = (1, 4, 4)  # frames, rows, columns
    width: int = 256
    layers: int = 6
    heads: int = 4
    ff_ratio: int = 4
    condition_width: int = 256
    rope_axes: tuple[int, int, int] = (16, 24, 24)  # a head's channels for frames, rows, columns
    rope_theta: float = 100.0  # lower than a language model's: axes are a few dozen tokens long

    def as_dict(self) -> dict[str, object]:
        """The sizes as plain data, for records in JSON."""
        return asdict(self)


def rotary_table(
    grid: tuple[int, int, int], axes: tuple[int, int, int], theta: float, device: torch.device
) -> Rotary:
    """Cosines and sines of the rotary angles of all tokens, each fp32 [N, head_dim / 2].

    Args:
        grid: tokens along frames, rows and columns.
        axes: channels of a head that each of the three turns.
        theta: the longest period, in tokens, is about 2 pi theta.
        device: where to build the tables.
    """
    lines = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    angles = []
    for position, width in zip(torch.meshgrid(*lines, indexing="ij"), axes, strict=True):
        pair = torch.arange(0, width, 2, device=device, dtype=torch.float32)
        angles.append(position.flatten()[:, None] * theta ** (-pair / width))
    table = torch.cat(angles, dim=-1)
    return table.cos(), table.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the channel pairs (i, i + d/2) of x [B, H, N, d] by the tokens' angles, in fp32."""
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention, queries and keys RMS-normed; to itself unless given other tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """[B, N, D] (and [B, L, D]) -> [B, N, D]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self.norm_q(self._split(self.to_q(hidden_states)))
        k = self.norm_k(self._split(self.to_k(source)))
        v = self._split(self.to_v(source))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        # Under autocast the fp32 norm weights promote q and k; attention wants one dtype.
        out = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, H, N, D / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; the timestep modulates the first and the last."""

    def __init__(self, width: int, heads: int, ff_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn2 = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = nn.Sequential(
            nn.Linear(width, ff_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(ff_ratio * width, width),
        )
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        rotary: Rotary,
    ) -> Tensor:
        """[B, N, D], [B, L, D] and the timestep's modulation [B, 6, D] -> [B, N, D]."""
        rows = (self.scale_shift_table + modulation).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = rows
        x = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn
        hidden_states = hidden_states + gate_attn * self.attn1(x, rotary=rotary)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        x = self.norm3(hidden_states) * (1 + scale_ff) + shift_ff
        return hidden_states + gate_ff * self.ff(x)


class TimestepEmbedding(nn.Module):
    """Timesteps [B] in 0..1000 -> [B, D]: sinusoids with periods of up to 10,000, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """The embedding in `dtype`; the angles are fp32, since bf16 would merge timesteps."""
        half = self.width // 2
        frequencies = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        angles = timestep.float()[:, None] * 10_000.0**-frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


class VideoDiT(nn.Module):
    """Predicts the velocity, noise - clip, of a rectified flow from noise to clips."""

    def __init__(self, config: VideoDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VideoDiTConfig()
        width, patch = config.width, config.patch
        self.patch_embedding = nn.Conv3d(config.channels, width, kernel_size=patch, stride=patch)
        self.context_embedding = nn.Linear(config.condition_width, width)
        self.time_embedding = TimestepEmbedding(width)
        self.time_projection = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.ff_ratio) for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = nn.Linear(width, config.channels * patch[0] * patch[1] * patch[2])
        # With zero gates and a zero head the untrained model predicts zero velocity.
        for layer in (self.time_projection, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        """The velocity, [B, C, F, H, W].

        Args:
            hidden_states: noisy clips [B, C, F, H, W].
            timestep: [B], 0 (clip) to 1000 (noise).
            encoder_hidden_states: condition tokens [B, L, condition_width].
        """
        tokens = self.patch_embedding(hidden_states)
        grid = (tokens.shape[2], tokens.shape[3], tokens.shape[4])
        tokens = tokens.flatten(2).transpose(1, 2)
        rotary = rotary_table(grid, self.config.rope_axes, self.config.rope_theta, tokens.device)
        context = self.context_embedding(encoder_hidden_states)
        time = self.time_embedding(timestep, hidden_states.dtype)
        modulation = self.time_projection(F.silu(time)).unflatten(-1, (6, -1))
        for block in self.blocks:
            tokens = block(tokens, context, modulation, rotary)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        return self._unpatchify(self.proj_out(self.norm_out(tokens) * (1 + scale) + shift), grid)

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, C * patch] -> [B, C, F, H, W]."""
        x = tokens.unflatten(1, grid).unflatten(-1, (self.config.channels, *self.config.patch))
        x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # channel; then grid and patch of each axis
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class ConditionEmbedding(nn.Module):
    """Scene and camera-motion ids -> condition tokens; stands in for a text encoder.

    It runs once per clip. The last id of each table is the null condition of guidance.
    """

    def __init__(self, scenes: int, motions: int, tokens: int = 4, width: int = 256) -> None:
        super().__init__()
        self.tokens, self.null_scene, self.null_motion = tokens, scenes, motions
        self.scene = nn.Embedding(scenes + 1, tokens * width)
        self.motion = nn.Embedding(motions + 1, tokens * width)

    def forward(self, scene: Tensor, motion: Tensor) -> Tensor:
        """Scene [B], motion [B] integer ids -> [B, 2 * tokens, width]."""
        pair = torch.cat((self.scene(scene), self.motion(motion)), dim=-1)
        return pair.unflatten(-1, (2 * self.tokens, -1))
