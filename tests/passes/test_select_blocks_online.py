from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.block_selection import reference
from ditopt.kernels.block_sparse_attention.lists import to_blocks
from ditopt.passes.base import ForcedBlocks, OnlineChoice
from ditopt.passes.select_blocks_online import SELECT, SelectBlocksOnline
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE
from ditopt.sites import SDPA

H, N, D, BLOCK = 2, 24, 8, 8
FORCED = torch.eye(3, dtype=torch.bool)


class Attention(nn.Module):
    """Self-attention of two heads; `arguments` go to the attention."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(H * D, H * D) for _ in "qkv")
        self.arguments = arguments

    def heads(self, x: Tensor) -> list[Tensor]:
        layers = (self.to_q, self.to_k, self.to_v)
        return [layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        out = scaled_dot_product_attention(*self.heads(x), **self.arguments)
        return out.transpose(1, 2).flatten(-2)


def tokens() -> Tensor:
    return torch.randn(1, N, H * D, generator=torch.Generator().manual_seed(2))


def choice(graph: Any, amount: float = 0.5, heads: int = H) -> dict[str, OnlineChoice]:
    """The plan lets the graph's only attention choose its blocks."""
    (node,) = graph.nodes(SDPA)
    return {node.name: OnlineChoice("top_k", amount, 1, BLOCK, BLOCK, heads, N, N)}


def test_the_selector_stands_before_the_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (decision,) = graph.run(SelectBlocksOnline(), online=choice(graph))
    assert decision.applied
    assert decision.reason == "top_k 0.5 of pooled blocks of 8 x 8 tokens, chosen at every call"
    assert [len(graph.nodes(t)) for t in (SDPA, SELECT, BLOCK_SPARSE)] == [0, 1, 1]
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    assert specs == [ForcedBlocks(decision.node)]


def test_all_blocks_are_dense_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    graph.run(SelectBlocksOnline(), online=choice(graph, amount=1.0))
    graph.assert_lossless(graph.result([FORCED]))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_chosen_blocks_are_attended(harness: Any, scale: float | None) -> None:
    graph = harness(Attention(scale=scale), tokens())
    graph.run(SelectBlocksOnline(), online=choice(graph))
    out = graph.result([FORCED])
    with torch.no_grad():
        q, k, _ = graph.module.heads(graph.inputs[0])
        rule = ("top_k", 0.5, 1, scale or D**-0.5)
        keep = to_blocks(*reference.select_pooled(q, k, FORCED, BLOCK, BLOCK, *rule), 3)
    assert 0 < int(keep.sum()) < keep.numel()
    graph.module.arguments["attn_mask"] = keep.repeat_interleave(BLOCK, 2).repeat_interleave(
        BLOCK, 3
    )
    graph.assert_lossless(out)


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = choice(graph)
    graph.run(SelectBlocksOnline(), online=wanted)
    assert graph.run(SelectBlocksOnline(), online=wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(SelectBlocksOnline(), online=choice(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize(
    ("arguments", "heads", "reason"),
    [
        (
            {"attn_mask": torch.zeros(N, N)},
            H,
            "the attention has a mask, and patterns do not combine with masks yet",
        ),
        ({"is_causal": True}, H, "the attention is causal"),
        ({}, 3, "the plan names 3 heads, the attention has 2"),
    ],
    ids=["mask", "causal", "heads"],
)
def test_declined(harness: Any, arguments: dict[str, Any], heads: int, reason: str) -> None:
    graph = harness(Attention(**arguments), tokens())
    code = graph.gm.code
    (decision,) = graph.run(SelectBlocksOnline(), online=choice(graph, heads=heads))
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


def test_without_a_wish_nothing_is_said(harness: Any) -> None:
    assert harness(Attention(), tokens()).run(SelectBlocksOnline()) == []
