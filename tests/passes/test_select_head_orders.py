from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.block_sparse_attention import pooling
from ditopt.passes.base import (
    BlockBias,
    ClusterChoice,
    ForcedBlocks,
    PlaceOrder,
    SelectorSlot,
    VoteChoice,
)
from ditopt.passes.select_head_orders import CLUSTER, PUT, TAKE, VOTE, SelectHeadOrders
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE
from ditopt.passes.substitute_means import WITH_POOLED, SubstituteMeans
from ditopt.sites import SDPA

H, FRAMES, PLACES, D, BLOCK = 2, 4, 6, 8, 8
N = FRAMES * PLACES
ROWS = N // BLOCK
ORDER = torch.arange(N).view(FRAMES, PLACES).T.flatten()  # place by place
SLOT = torch.tensor(0)


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


class Cross(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:]).flatten(1)


def tokens() -> Tensor:
    return 2 * torch.randn(1, N, H * D, generator=torch.Generator().manual_seed(2))


def votes(heads: int = H) -> VoteChoice:
    return VoteChoice(BLOCK, BLOCK, heads, 6, N, N)


def clusters(mass: float = 0.8, text: int = 0, heads: int = H) -> ClusterChoice:
    return ClusterChoice(BLOCK, BLOCK, heads, (3, 4), (5, 2), mass, 0.1, text)


def run(graph: Any, choice: Any, **context: Any) -> list[Any]:
    (node,) = graph.nodes(SDPA)
    return graph.run(SelectHeadOrders(), orders={node.name: choice}, **context)


def specs(graph: Any) -> list[Any]:
    return [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]


def given(graph: Any, keep: Tensor) -> list[Tensor]:
    values = {ForcedBlocks: keep, PlaceOrder: ORDER, SelectorSlot: SLOT}
    return [values[type(spec)] for spec in specs(graph)]


def test_heads_vote_for_an_order(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (decision,) = run(graph, votes())
    assert decision.applied
    assert decision.reason == (
        "6 queries of each head choose between one pattern frame by frame and place by place, "
        "at every call"
    )
    assert set(specs(graph)) == {ForcedBlocks(decision.node), PlaceOrder(decision.node)}
    found = [len(graph.nodes(t)) for t in (SDPA, VOTE, TAKE, BLOCK_SPARSE, PUT)]
    assert found == [0, 1, 3, 1, 1]


def test_heads_sort_their_tokens_into_clusters(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (decision,) = run(graph, clusters())
    assert decision.applied
    assert decision.reason == (
        "tokens sorted into 3 clusters of queries and 4 of keys in each head, 0.8 of the mass over "
        "clusters kept, at every call"
    )
    assert specs(graph) == [SelectorSlot(decision.node)]
    assert [len(graph.nodes(t)) for t in (SDPA, CLUSTER, TAKE, PUT)] == [0, 1, 3, 1]


@pytest.mark.parametrize("choice", [votes(), clusters(mass=1.0)], ids=["votes", "clusters"])
def test_all_blocks_are_dense_attention(harness: Any, choice: Any) -> None:
    graph = harness(Attention(), tokens())
    run(graph, choice)
    graph.assert_lossless(graph.result(given(graph, torch.ones(ROWS, ROWS, dtype=torch.bool))))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_each_head_attends_in_the_order_that_it_chose(harness: Any, scale: float | None) -> None:
    graph = harness(Attention(scale=scale), tokens())
    run(graph, votes())
    keep = torch.eye(ROWS, dtype=torch.bool)
    out = graph.result(given(graph, keep))
    with torch.no_grad():
        q, k, v = graph.module.heads(graph.inputs[0])
        settings = (BLOCK, BLOCK, 6, scale or D**-0.5)
        orders = torch.ops.ditopt.vote_order(q, k, v, keep, ORDER, *settings)[0]
    block = orders.argsort(-1) // BLOCK
    graph.module.arguments["attn_mask"] = block[..., None] == block[..., None, :]
    graph.assert_lossless(out)


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (node,) = graph.nodes(SDPA)
    wanted = {node.name: votes()}
    graph.run(SelectHeadOrders(), orders=wanted)
    assert graph.run(SelectHeadOrders(), orders=wanted) == []


@pytest.mark.parametrize("choice", [votes(), clusters()], ids=["votes", "clusters"])
def test_outputs_keep_shape_and_strides(harness: Any, choice: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    run(graph, choice)
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize("choice", [votes(), clusters()], ids=["votes", "clusters"])
def test_means_may_stand_for_what_is_left_out(harness: Any, choice: Any) -> None:
    graph = harness(Attention(), tokens())
    (node,) = graph.nodes(SDPA)
    passes = (SelectHeadOrders(), SubstituteMeans())
    decisions = graph.run(*passes, orders={node.name: choice}, means=frozenset({node.name}))
    assert [d.applied for d in decisions] == [True, True]
    assert len(graph.nodes(WITH_POOLED)) == 1
    bias = pooling.log_lengths(N, BLOCK, None, torch.device("cpu"))
    values = {ForcedBlocks: torch.eye(ROWS, dtype=torch.bool), PlaceOrder: ORDER}
    values |= {SelectorSlot: SLOT, BlockBias: bias}
    out = graph.result([values[type(spec)] for spec in specs(graph)])
    with torch.no_grad():
        dense = graph.module(graph.inputs[0])
    assert 0 < float((out - dense).norm() / dense.norm()) < 1


@pytest.mark.parametrize(
    ("module", "choice", "reason"),
    [
        (
            Attention(attn_mask=torch.zeros(N, N)),
            votes(),
            "the attention has a mask, and patterns do not combine with masks yet",
        ),
        (Attention(is_causal=True), clusters(), "the attention is causal"),
        (Attention(), votes(heads=3), "the plan names 3 heads, the attention has 2"),
        (Cross(), votes(), "queries and keys are different sequences"),
        (
            Attention(),
            clusters(text=5),
            "5 tokens of its sequence are text, which must always be kept",
        ),
    ],
    ids=["mask", "causal", "heads", "cross", "text"],
)
def test_declined(harness: Any, module: nn.Module, choice: Any, reason: str) -> None:
    graph = harness(module, tokens())
    code = graph.gm.code
    (decision,) = run(graph, choice)
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


def test_without_a_wish_nothing_is_said(harness: Any) -> None:
    assert harness(Attention(), tokens()).run(SelectHeadOrders()) == []
