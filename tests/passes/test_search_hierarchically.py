from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.hierarchical_attention import reference
from ditopt.passes.base import HierarchicalChoice
from ditopt.passes.search_hierarchically import HIERARCHICAL, SearchHierarchically
from ditopt.sites import SDPA

H, N, D = 2, 80, 8


class Attention(nn.Module):
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


def wish(graph: Any, **changes: Any) -> dict[str, HierarchicalChoice]:
    (node,) = graph.nodes(SDPA)
    wanted = {"top_k": 2, "coarse": True, "heads": H, "tokens": N, "text": 0} | changes
    return {node.name: HierarchicalChoice(**wanted)}


@pytest.mark.parametrize("coarse", [False, True])
def test_the_attention_searches_its_blocks(harness: Any, coarse: bool) -> None:
    graph = harness(Attention(), tokens())
    (decision,) = graph.run(SearchHierarchically(), hierarchical=wish(graph, coarse=coarse))
    assert (decision.applied, decision.reason) == (True, "best 2 blocks at each of 1 levels")
    assert [len(graph.nodes(t)) for t in (SDPA, HIERARCHICAL)] == [0, 1]
    out = graph.result()
    with torch.no_grad():
        q, k, v = graph.module.double().heads(graph.inputs[0].double())
        expected = reference.attention(q, k, v, 16, 2, 1, coarse, D**-0.5)
    expected = expected.transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_keeping_all_blocks_is_dense_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    graph.run(SearchHierarchically(), hierarchical=wish(graph, top_k=8, coarse=False))
    graph.assert_lossless(graph.result())


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = wish(graph)
    graph.run(SearchHierarchically(), hierarchical=wanted)
    assert graph.run(SearchHierarchically(), hierarchical=wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(SearchHierarchically(), hierarchical=wish(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize(
    ("arguments", "changes", "reason"),
    [
        ({"is_causal": True}, {}, "the attention is causal"),
        ({}, {"heads": 3}, "the plan names 3 heads, the attention has 2"),
        ({}, {"text": 7}, "7 tokens of its sequence are text, which must always be kept"),
    ],
    ids=["causal", "heads", "text"],
)
def test_declined(
    harness: Any, arguments: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    graph = harness(Attention(**arguments), tokens())
    code = graph.gm.code
    (decision,) = graph.run(SearchHierarchically(), hierarchical=wish(graph, **changes))
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


class Bare(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


def test_declined_for_two_sequences(harness: Any) -> None:
    graph = harness(Bare(), torch.randn(1, H, N, D), *(torch.randn(1, H, 7, D) for _ in "kv"))
    (decision,) = graph.run(SearchHierarchically(), hierarchical=wish(graph))
    assert decision.reason == "queries and keys are different sequences"
