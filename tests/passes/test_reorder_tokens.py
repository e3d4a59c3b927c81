from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.layout import TokenLayout
from ditopt.passes.base import SparseChoice, TokenPermutation
from ditopt.passes.reorder_tokens import GATHER, ReorderTokens
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, SelectSparsePattern
from ditopt.patterns import Window, block_lists
from ditopt.sites import SDPA
from ditopt.token_order import Tile, inverse, sequence_permutation

H, D = 2, 8
LAYOUT = TokenLayout(2, 4, 4, text_after=3)
N = LAYOUT.total
ORDER = Tile(frames=2, rows=2, cols=2)
WHY = "tile order around this attention: the blocks are not token-wise"


class Attention(nn.Module):
    """Self-attention of two heads; `arguments` go to the attention."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(H * D, H * D) for _ in "qkv")
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (H, D)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = scaled_dot_product_attention(q, k, v, **self.arguments)
        return out.transpose(1, 2).flatten(-2)


def tokens() -> Tensor:
    return torch.randn(1, N, H * D, generator=torch.Generator().manual_seed(2))


def wish(graph: Any) -> dict[str, str]:
    (node,) = graph.nodes(SDPA)
    return {node.name: WHY}


def orders() -> list[Tensor]:
    moved = sequence_permutation(ORDER, LAYOUT)
    return [torch.from_numpy(x) for x in (moved, inverse(moved))]


def test_operands_are_permuted_and_the_output_is_put_back(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (decision,) = graph.run(ReorderTokens(), reordered=wish(graph))
    assert (decision.applied, decision.reason) == (True, WHY)
    assert len(graph.nodes(GATHER)) == 4
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    assert specs == [TokenPermutation(decision.node, False), TokenPermutation(decision.node, True)]
    graph.assert_lossless(graph.result(orders()))


def test_in_float64_an_order_changes_nothing(harness: Any) -> None:
    module = Attention().double()
    graph = harness(module, tokens().double())
    graph.run(ReorderTokens(), reordered=wish(graph))
    with torch.no_grad():
        expected = module(*graph.inputs)
    torch.testing.assert_close(graph.result(orders()), expected, rtol=0, atol=1e-12)


def test_patterns_in_order_keep_what_they_keep_in_raster(harness: Any) -> None:
    """A window of one tile in tile order is exact: the mask is the same set of pairs."""
    pattern = Window(frames=2, rows=1, cols=1)
    shape = (LAYOUT, N, N, 1, 1)
    graph = harness(Attention(), tokens())
    (node,) = graph.nodes(SDPA)
    choice = {node.name: SparseChoice(1, 1, H, N, N)}
    graph.run(ReorderTokens(), SelectSparsePattern(), reordered=wish(graph), sparse=choice)
    assert len(graph.nodes(BLOCK_SPARSE)) == H
    lists = block_lists([pattern] * H, *shape, "cpu", ORDER)
    out = graph.result([*orders(), *lists])
    raster = harness(Attention(), tokens())
    raster.module.load_state_dict(graph.module.state_dict())
    (node,) = raster.nodes(SDPA)
    raster.run(SelectSparsePattern(), sparse={node.name: choice.popitem()[1]})
    plain = raster.result(block_lists([pattern] * H, *shape, "cpu"))
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-6)


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = wish(graph)
    graph.run(ReorderTokens(), reordered=wanted)
    assert graph.run(ReorderTokens(), reordered=wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(ReorderTokens(), reordered=wish(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"attn_mask": torch.zeros(N, N)},
            "the attention has a mask, and patterns do not combine with masks yet",
        ),
        ({"is_causal": True}, "the attention is causal"),
    ],
    ids=["mask", "causal"],
)
def test_declined(harness: Any, arguments: dict[str, Any], reason: str) -> None:
    graph = harness(Attention(**arguments), tokens())
    code = graph.gm.code
    (decision,) = graph.run(ReorderTokens(), reordered=wish(graph))
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


class Bare(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


def test_declined_for_two_sequences(harness: Any) -> None:
    graph = harness(Bare(), torch.randn(1, H, N, D), *(torch.randn(1, H, 7, D) for _ in "kv"))
    (decision,) = graph.run(ReorderTokens(), reordered=wish(graph))
    assert decision.reason == "queries and keys are different sequences"


def test_without_a_wish_nothing_is_said(harness: Any) -> None:
    assert harness(Attention(), tokens()).run(ReorderTokens()) == []
