"""A small image DiT, a sampler for it, and plans that fit both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.layout import TokenLayout
from ditopt.plan import Block as BlockSize
from ditopt.plan import Cache, Hardware, ModelRecord, Phase, Plan, Sampler, SiteRecord
from ditopt.torch_backend import compiled_graphs

TIMESTEPS = (900.0, 750.0, 600.0, 450.0, 300.0, 150.0)
CACHE = Cache(
    full=(0, 1, 3), history=2, coefficients={2: (2.0, -1.0), 4: (1.5, -0.5), 5: (2.0, -1.0)}
)


class Block(nn.Module):
    """Self-attention and a modulated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.modulate = nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, N, D] and the modulation [B, D] -> [B, N, D]."""
        y = self.norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        scale, shift = self.modulate(emb)[:, None].chunk(2, dim=-1)
        return x + self.down(F.gelu(self.up(x * (1 + scale) + shift)))


class SmallDiT(nn.Module):
    """Patches of 2 x 2 pixels, blocks, and a projection back to pixels.

    `residuals`, one tensor [B, N, D] per block, are added as a ControlNet's are.
    """

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 4, text: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.time, self.text = nn.Linear(1, width), nn.Linear(text, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, 3 * 4)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """[B, 3, H, W], [B], [B, L, 8] -> [B, 3, H, W]."""
        height, width = hidden_states.shape[-2] // 2, hidden_states.shape[-1] // 2
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        emb = self.time(timestep[:, None].to(x.dtype) / 1000)
        emb = emb + self.text(encoder_hidden_states).mean(1)
        for number, block in enumerate(self.blocks):
            x = block(x, emb)
            if residuals is not None:
                x = x + residuals[number]
        x = self.out(x).unflatten(1, (height, width)).unflatten(-1, (3, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def small_dit(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> SmallDiT:
    torch.manual_seed(0)
    return SmallDiT(**sizes).to(device, dtype).eval().requires_grad_(False)


@lru_cache
def shared_plan(branches: int = 1) -> Plan:
    """The plan of `small_dit()`, whose weights are the same each time; made once."""
    model = small_dit()
    return plan_for(model, arguments(model), branches=branches)


def arguments(
    model: nn.Module, *, seed: int = 0, batch: int = 1, size: tuple[int, int] = (8, 8)
) -> dict[str, Tensor]:
    """One call's arguments at timestep 900, on the device and in the dtype of the model."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    return {
        "hidden_states": draw(batch, 3, *size),
        "timestep": torch.full((batch,), TIMESTEPS[0], device=like.device),
        "encoder_hidden_states": draw(batch, 5, 8),
    }


def sample(
    model: Any,
    given: Mapping[str, Any],
    timesteps: Sequence[float | Tensor] = TIMESTEPS,
    **more: Any,
) -> list[Tensor]:
    """What a denoiser returns at each step of a short loop that walks along its results."""
    given, seen = dict(given), []
    with torch.no_grad():
        for t in timesteps:
            batch = given["hidden_states"].shape[0]
            given["timestep"] = (
                t.expand(batch)
                if isinstance(t, Tensor)
                else torch.full((batch,), t, device=given["hidden_states"].device)
            )
            seen.append(model(**given, **more))
            given["hidden_states"] = given["hidden_states"] - 0.1 * seen[-1]
    return seen


def plan_for(
    model: nn.Module,
    given: Mapping[str, Any],
    *,
    cache: Cache | None = CACHE,
    attention: Sequence[tuple[tuple[int, int], Mapping[str, Any]]] = (),
    timesteps: Sequence[float] = TIMESTEPS,
    varying: Sequence[str] = ("hidden_states", "timestep"),
    branches: int = 1,
    block: int = 16,
) -> Plan:
    """A plan for `model`, whose sites are those of a call with `given`."""
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend="ditopt_eager")(**given)
    record = compiled_graphs(model)[-1]
    torch.compiler.reset()
    assert record.grid is not None
    frames, height, width = (int(size) for size in record.grid)
    return Plan(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name=type(model).__name__,
            sites=tuple(
                SiteRecord(id=s.id, kind=s.kind, heads=s.heads, head_dim=s.head_dim)
                for s in record.attention
            ),
        ),
        sampler=Sampler(
            calls=len(timesteps),
            branches=branches,
            timestep="timestep",
            timesteps=tuple(timesteps),
            varying=tuple(varying),
        ),
        hardware=Hardware(device="cpu", name="-", torch=torch.__version__, threads=1),
        layout=TokenLayout(frames=frames, height=height, width=width),
        block=BlockSize(q=block, k=block),
        phases=tuple(
            Phase(calls=calls, attention=dict(rules))
            for calls, rules in (attention or [((0, len(timesteps)), {})])
        ),
        cache=cache,
    )
