"""Small models of the shapes that the field builds beside the usual one, in plain PyTorch.

Each follows an idea that the published architectures of `models` lack: experts, self-conditioning,
keys from a reference picture, two modalities that read each other, wide and odd heads, recurrent
and hybrid blocks, block-causal attention, lists of pictures, an eager softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32


def heads(x: Tensor, count: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Attention of x to itself, or to a context, with keys and values of more tokens appended."""

    def __init__(self, width: int = WIDTH, count: int = 2, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width
        self.count = count
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            heads(layer(y), self.count)
            for layer, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        if extra is not None:
            k, v = torch.cat([k, extra[0]], dim=2), torch.cat([v, extra[1]], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Modulated(nn.Module):
    """Attention and feed-forward under adaLN."""

    def __init__(self, width: int = WIDTH, count: int = 2, inner: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn, self.ff = Attention(width, count, inner), FeedForward(width)
        self.modulate = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, emb: Tensor, **more: Any) -> Tensor:
        scale, shift = self.modulate(F.silu(emb))[:, None].chunk(2, dim=-1)
        x = x + self.attn(self.norm(x) * (1 + scale) + shift, **more)
        return x + self.ff(self.norm(x))


class Base(nn.Module):
    """Patches in, patches out, an embedding of the timestep."""

    def __init__(self, blocks: nn.ModuleList, channels: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 2, 2)
        self.time = nn.Linear(1, width)
        self.blocks = blocks
        self.out = nn.Linear(width, 4 * 4)

    def tokens(self, x: Tensor) -> Tensor:
        return self.patch(x).flatten(2).transpose(1, 2)

    def embed(self, timestep: Tensor) -> Tensor:
        return self.time(timestep[:, None] / 1000)

    def pixels(self, x: Tensor, like: Tensor) -> Tensor:
        x = self.out(x).transpose(1, 2).unflatten(2, (like.shape[2] // 2, like.shape[3] // 2))
        return F.pixel_shuffle(x, 2)


class Experts(nn.Module):
    """Every token through two of four experts, all computed and mixed by their gates."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(FeedForward() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        best, index = self.gate(x).softmax(-1).topk(2, dim=-1)
        weights = torch.zeros_like(x[..., :4]).scatter(-1, index, best)
        mixed = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (mixed * weights[..., None, :]).sum(-1)


class MixtureOfExperts(Base):
    """DiT-MoE (2407.11633): the feed-forward of each block is a mixture."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(3)))
        for block in self.blocks:
            block.ff = Experts()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        for block in self.blocks:
            x = block(x, emb)
        return self.pixels(x, hidden_states)


class SelfConditioned(Base):
    """Bit Diffusion's self-conditioning (2208.04202): the last prediction is an input."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(3)), channels=8)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, previous: Tensor | None = None
    ) -> Tensor:
        if previous is None:
            previous = torch.zeros_like(hidden_states)
        x = self.tokens(torch.cat([hidden_states, previous], dim=1))
        emb = self.embed(timestep)
        for block in self.blocks:
            x = block(x, emb)
        return self.pixels(x, hidden_states)


class ReferenceKeys(Base):
    """Keys and values of a reference picture beside one's own, as in editing and try-on."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(3)))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, reference: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        for block, extra in zip(self.blocks, reference, strict=True):
            x = block(x, emb, extra=extra)
        return self.pixels(x, hidden_states)


class TwoModalities(Base):
    """Video and audio tokens in streams of their own that read each other (audio-video models)."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(3)))
        self.audio_blocks = nn.ModuleList(Modulated() for _ in range(3))
        self.listen, self.watch = (nn.ModuleList(Attention() for _ in range(3)) for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, audio: Tensor) -> dict[str, Tensor]:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        layers = zip(self.blocks, self.audio_blocks, self.listen, self.watch, strict=True)
        for block, audio_block, listen, watch in layers:
            x, audio = block(x, emb), audio_block(audio, emb)
            x, audio = x + listen(x, audio), audio + watch(audio, x)
        return {"sample": self.pixels(x, hidden_states), "audio": audio}


class OddHeads(Base):
    """Heads of 72 channels in one block and of 256 in the next."""

    def __init__(self) -> None:
        sizes = [(2, 144), (1, 256)]
        super().__init__(nn.ModuleList(Modulated(WIDTH, n, inner) for n, inner in sizes))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        for block in self.blocks:
            x = block(x, emb)
        return self.pixels(x, hidden_states)


class Recurrence(nn.Module):
    """A gated linear recurrence over the tokens, both ways, by cumulative sums (Mamba2's form)."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def scan(self, value: Tensor, decay: Tensor) -> Tensor:
        total = decay.cumsum(1)
        return torch.exp(total - total.amax(1, keepdim=True)) * (value * torch.exp(-total)).cumsum(
            1
        )

    def forward(self, x: Tensor) -> Tensor:
        value, gate, decay = self.inward(x).chunk(3, dim=-1)
        decay = -F.softplus(decay) / x.shape[1]
        both = [self.scan(value, decay), self.scan(value.flip(1), decay.flip(1)).flip(1)]
        return self.out(torch.cat(both, dim=-1) * F.silu(gate).repeat(1, 1, 2))


class Hybrid(Base):
    """Recurrent blocks with a local attention between them (LinGen 2412.09856, LaMamba-Diff)."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(4)))
        for block in self.blocks[::2]:
            block.attn = Recurrence()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        for block in self.blocks:
            x = block(x, emb)
        return self.pixels(x, hidden_states)


class BlockCausal(Base):
    """Frames see themselves and those before: a mask that is made of the shapes in the model."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(3)))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        frame = torch.arange(x.shape[1], device=x.device) // (hidden_states.shape[3] // 2)
        mask = frame[:, None] >= frame[None]
        for block in self.blocks:
            x = block(x, emb, mask=mask)
        return self.pixels(x, hidden_states)


class EagerSoftmax(Base):
    """Attention written out: two products and a softmax."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Modulated() for _ in range(3)))
        for block in self.blocks:
            block.attn.forward = self._written_out(block.attn)

    @staticmethod
    def _written_out(attention: Attention) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            q, k, v = (
                heads(layer(x), attention.count)
                for layer in (attention.to_q, attention.to_k, attention.to_v)
            )
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            return attention.to_out((weights @ v).transpose(1, 2).flatten(2))

        return forward

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, emb = self.tokens(hidden_states), self.embed(timestep)
        for block in self.blocks:
            x = block(x, emb)
        return self.pixels(x, hidden_states)


@dataclass(frozen=True)
class Shape:
    """A model, what it takes beside latents and timestep, and how many attentions it has."""

    model: type[nn.Module]
    attentions: int
    more: Callable[[int], dict[str, Any]] = lambda batch: {}


def _reference(batch: int) -> dict[str, Any]:
    pair = lambda: (torch.randn(batch, 2, 5, WIDTH // 2), torch.randn(batch, 2, 5, WIDTH // 2))  # noqa: E731
    return {"reference": [pair() for _ in range(3)]}


SHAPES = {
    "experts": Shape(MixtureOfExperts, 3),
    "self_conditioned": Shape(
        SelfConditioned, 3, lambda batch: {"previous": torch.randn(batch, 4, 8, 12)}
    ),
    "reference_keys": Shape(ReferenceKeys, 3, _reference),
    "two_modalities": Shape(
        TwoModalities, 12, lambda batch: {"audio": torch.randn(batch, 7, WIDTH)}
    ),
    "odd_heads": Shape(OddHeads, 2),
    "hybrid": Shape(Hybrid, 2),
    "block_causal": Shape(BlockCausal, 3),
    "eager_softmax": Shape(EagerSoftmax, 0),
}


def build_shape(name: str) -> nn.Module:
    """The model with seeded weights, in eval mode."""
    torch.manual_seed(0)
    return SHAPES[name].model().eval().requires_grad_(False)


def arguments(name: str, t: float = 500.0, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """The arguments of one call, seeded."""
    torch.manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 12),
        "timestep": torch.full((batch,), t),
        **SHAPES[name].more(batch),
    }
