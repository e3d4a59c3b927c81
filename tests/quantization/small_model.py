"""A small model, and plans for its linear layers written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.plan import Hardware, LinearRecord, ModelRecord, Phase, Plan, Sampler, SiteRecord


class Block(nn.Module):
    """Modulated norm, attention and MLP, as in a DiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale, shift_ff, scale_ff = self.modulation(t)[:, None].chunk(4, -1)
        width = (x.shape[-1],)
        y = nn.functional.layer_norm(x, width) * (1 + scale) + shift
        q, k, v = (
            layer(y).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.to_out(y)
        y = nn.functional.layer_norm(x, width) * (1 + scale_ff) + shift_ff
        return x + self.down(nn.functional.gelu(self.up(y)))


class Model(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


def plan_for(
    model: nn.Module,
    *phases: Mapping[str, Mapping[str, Any]],
    heads: int = 2,
    statistics: Mapping[str, Tensor] | None = None,
) -> Plan:
    """One call for each phase; layers by name."""
    linears = [
        LinearRecord(id=name, in_features=m.in_features, out_features=m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    sites = [
        SiteRecord(id=f"{name}#0", kind="self", heads=heads, head_dim=m.to_q.out_features // heads)
        for name, m in model.named_modules()
        if isinstance(m, Block)
    ]
    plan = Plan(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name=type(model).__name__,
            sites=tuple(sites),
            linears=tuple(linears),
        ),
        sampler=Sampler(calls=len(phases)),
        hardware=Hardware(device="cpu", name="a CPU", torch=torch.__version__, threads=1),
        phases=tuple(
            Phase.model_validate({"calls": (k, k + 1), "linear": dict(rules)})
            for k, rules in enumerate(phases)
        ),
    )
    return plan.with_tensors(statistics) if statistics else plan
