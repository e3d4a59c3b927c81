"""The proof that a graph commutes with an order of tokens, and plans that put tokens in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt import fingerprint
from ditopt.capture import Captured, capture
from ditopt.plan import Plan
from ditopt.token_axis import follow
from ditopt.token_rules import Axes, Mixes
from ditopt.torch_backend import compiled_graphs

N, C = 12, 8
GRID = (2, 4, 4)


class Run(nn.Module):
    """A function as a module with a weight."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(C, C))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def captured(module: nn.Module, *inputs: Tensor) -> Captured:
    found: list[Captured] = []

    def backend(gm: Any, examples: list[Any]) -> Any:
        found.append(capture(gm, whole=True))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return found[0]


def analyse(function: Callable[..., Tensor], *inputs: Tensor, **axes: Axes) -> Axes:
    """Axes of the result; user inputs are named after their position, `x0`, `x1`, ..."""
    graph = captured(Run(function), *inputs)
    (piece,) = graph.pieces
    given: list[Axes] = []
    users = 0
    for slot in piece.inputs:
        is_user = graph.inputs[slot].role == "user"
        given.append(axes.get(f"x{users}", {}) if is_user else {})
        users += is_user
    (result,), _ = follow(piece.body.gm, given, N)
    return result


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


def heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (2, -1)).transpose(1, 2)


def rotate(value: Tensor, table: Tensor) -> Tensor:
    """RoPE as FLUX writes it: pairs, a stack, a flatten."""
    first, second = value.unflatten(-1, (-1, 2)).unbind(-1)
    return value * table + torch.stack([-second, first], -1).flatten(-2) * table


TOKENWISE = {
    "linear": (lambda m, a: a @ m.weight, [x(1, N, C)], {1: 0}),
    "view": (lambda m, a: heads(a), [x(1, N, C)], {2: 0}),
    "norm": (lambda m, a: nn.functional.layer_norm(a, (C,)), [x(1, N, C)], {1: 0}),
    "pool": (lambda m, a: a.mean(1), [x(1, N, C)], {}),
    "softmax": (lambda m, a: a.softmax(1), [x(1, N, C)], {1: 0}),
    "text": (lambda m, a: torch.cat([x(1, 5, C), a], 1), [x(1, N, C)], {1: 5}),
    "part": (lambda m, a: torch.cat([x(1, 5, C), a], 1)[:, 3:], [x(1, N, C)], {1: 2}),
    "text alone": (lambda m, a: torch.cat([x(1, 5, C), a], 1)[:, :5], [x(1, N, C)], {}),
    "split": (
        lambda m, a: torch.cat([x(1, 5, C), a], 1).split([5, N], 1)[1],
        [x(1, N, C)],
        {1: 0},
    ),
    "channels": (lambda m, a: a.chunk(2, -1)[0], [x(1, N, C)], {1: 0}),
    "linear attention": (
        lambda m, a: a @ (a.transpose(1, 2) @ a),
        [x(1, N, C)],
        {1: 0},
    ),
}


@pytest.mark.parametrize(("function", "inputs", "expected"), TOKENWISE.values(), ids=TOKENWISE)
def test_token_wise_operators_keep_the_axis(
    function: Any, inputs: list[Tensor], expected: Axes
) -> None:
    assert dict(analyse(function, *inputs, x0={1: 0})) == expected


def test_attention_with_rope_follows_its_queries() -> None:
    def block(m: Any, a: Tensor, table: Tensor) -> Tensor:
        q = rotate(heads(a @ m.weight), table)
        out = scaled_dot_product_attention(q, rotate(heads(a), table), heads(a))
        return a + out.transpose(1, 2).flatten(-2)

    inputs = (x(1, N, C), x(1, 1, N, C // 2))
    assert dict(analyse(block, *inputs, x0={1: 0}, x1={2: 0})) == {1: 0}
    with pytest.raises(Mixes, match="joins tokens with a value in a fixed order"):
        analyse(block, *inputs, x0={1: 0})


def attend(m: Any, a: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(heads(a), heads(a), heads(a), attn_mask=mask)


def test_a_mask_shares_the_order() -> None:
    assert dict(analyse(attend, x(1, N, C), x(N, N), x0={1: 0}, x1={0: 0, 1: 0})) == {2: 0}
    assert dict(analyse(attend, x(1, N, C), x(1, N), x0={1: 0}, x1={1: 0})) == {2: 0}
    with pytest.raises(Mixes, match="has a mask in another order"):
        analyse(attend, x(1, N, C), x(N, N), x0={1: 0}, x1={1: 0})


REFUSED = {
    "frames": (lambda m, a: a.unflatten(1, (3, 4)), "splits or merges the token axis"),
    "shift": (lambda m, a: a + torch.arange(N)[:, None], "value in a fixed order"),
    "one token": (lambda m, a: a[:, 0], "picks one token"),
    "some tokens": (lambda m, a: a[:, :4], "takes a part of the tokens"),
    "roll": (lambda m, a: a.roll(1, 1), "aten.roll.default has no rule"),
    "sum so far": (lambda m, a: a.cumsum(1), "aten.cumsum.default has no rule"),
    "conv": (
        lambda m, a: nn.functional.conv1d(a.transpose(1, 2), m.weight[..., None], padding=0),
        "has no rule",
    ),
    "twice": (lambda m, a: torch.cat([a, a], 1), "puts the tokens twice into one sequence"),
    "causal": (
        lambda m, a: scaled_dot_product_attention(heads(a), heads(a), heads(a), is_causal=True),
        "is causal",
    ),
    "weights of tokens": (
        lambda m, a: a.transpose(1, 2) @ torch.arange(12.0).expand(N, N),
        "multiplies tokens with a value in a fixed order",
    ),
    "norm of tokens": (
        lambda m, a: nn.functional.layer_norm(a.transpose(1, 2), (N,)),
        "normalises over the tokens",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_depends_on_the_order_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(Mixes, match=reason):
        analyse(function, x(1, N, C), x0={1: 0})


class Block(nn.Module):
    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(C, C) for _ in range(4))
        self.conv = nn.Conv1d(C, C, 3, padding=1) if mixing else None
        self.mask: Tensor | None = None

    def forward(self, hidden: Tensor, rope: Tensor) -> Tensor:
        q, k, v = (heads(layer(hidden)) for layer in (self.to_q, self.to_k, self.to_v))
        out = scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, attn_mask=self.mask)
        hidden = hidden + self.out(out.transpose(1, 2).flatten(-2))
        if self.conv is not None:
            hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden


class Model(nn.Module):
    """A video model of 2 x 4 x 4 tokens with a RoPE table beside the tokens."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv3d(3, C, (1, 2, 2), stride=(1, 2, 2)), nn.Linear(C, 4)
        self.blocks = nn.ModuleList(Block(mixing) for _ in range(2))
        self.register_buffer("rope", torch.randn(1, 1, 32, C // 2))

    def forward(self, latent: Tensor) -> Tensor:
        hidden = self.embed(latent).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden, self.rope)
        return self.head(hidden)


def plan_for(model: nn.Module, kept: dict[str, Any]) -> dict[str, Any]:
    sites = [f"blocks.{k}#0" for k in range(2)]
    return {
        "ditopt_plan": 1,
        "model": {
            "architecture": fingerprint.architecture(model),
            "weights": fingerprint.weights(model),
            "name": "Model",
            "sites": [{"id": s, "kind": "self", "heads": 2, "head_dim": C // 2} for s in sites],
        },
        "sampler": {"calls": 2},
        "hardware": {"device": "cpu", "name": "a CPU", "torch": "2.13.0", "threads": 2},
        "layout": {"frames": 2, "height": 4, "width": 4, "text_before": 0, "text_after": 0},
        "block": {"q": 8, "k": 8},
        "order": {"kind": "tile", "frames": 2, "rows": 2, "cols": 2},
        "phases": [
            {"calls": [0, 2], "attention": {site: [kept] * 2 for site in sites}},
        ],
    }


def tile_mask() -> Tensor:
    """Tokens of one 2 x 2 x 2 tile see each other."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    tile = ((t // 2) * 2 + h // 2) * 2 + w // 2
    return tile.flatten()[:, None] == tile.flatten()[None, :]


@pytest.mark.parametrize("mixing", [False, True], ids=["token-wise", "with a convolution"])
def test_a_plan_orders_tokens_where_it_may(tmp_path: Path, mixing: bool) -> None:
    torch.manual_seed(0)
    model = Model(mixing).double().eval()
    # A window of one token keeps the diagonal blocks: in tile order those are the tiles.
    pattern = {"kind": "window", "frames": 1, "rows": 1, "cols": 1}
    path = tmp_path / "plan.yaml"
    Plan.from_text(json.dumps(plan_for(model, pattern))).save(path)
    torch._dynamo.reset()
    run = torch.compile(model, backend="ditopt_eager", options={"plan": str(path)}, dynamic=False)
    latent = torch.randn(1, 3, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        dense = model(latent)
        out = run(latent)
        for block in model.blocks:
            block.mask = tile_mask()
        expected = model(latent)
    assert not torch.allclose(expected, dense, atol=1e-3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    (record,) = compiled_graphs(model)
    decisions = [d for d in record.decisions if d.rule == "reorder_tokens"]
    if mixing:
        assert [d.site for d in decisions] == ["blocks.0#0", "blocks.1#0"]
        assert decisions[0].reason == (
            "tokens in tile order around this attention: "
            "in blocks.0 aten.conv1d.default has no rule"
        )
    else:
        (decision,) = decisions
        assert decision.site == "model"
        assert decision.reason.startswith(
            "tokens in tile order once around blocks.0 to blocks.1, with everything that runs "
            "along them (2 tensors in, 1 out)"
        )
    assert all(d.applied for d in decisions)
