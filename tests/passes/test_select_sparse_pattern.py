from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.passes.base import BlockLists, SparseChoice
from ditopt.passes.fuse_projections import FuseProjections
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, SelectSparsePattern
from ditopt.sites import SDPA

H, N, D, BLOCK = 2, 24, 8, 8


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


def choice(graph: Any, heads: int = H) -> dict[str, SparseChoice]:
    """The plan names the graph's only attention."""
    (node,) = graph.nodes(SDPA)
    return {node.name: SparseChoice(BLOCK, BLOCK, heads, N, N)}


def lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ids for a mask of blocks [1, H, QB, KB]."""
    ids = torch.zeros(keep.shape, dtype=torch.int32)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:3])).tolist():
        kept = keep[tuple(row)].nonzero().flatten().int()
        ids[tuple(row)][: len(kept)] = kept
    return keep.sum(-1, dtype=torch.int32), ids


def full() -> Tensor:
    return torch.ones(1, H, N // BLOCK, N // BLOCK, dtype=torch.bool)


def test_each_head_gets_a_call_with_lists_of_its_own(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (decision,) = graph.run(SelectSparsePattern(), sparse=choice(graph))
    assert decision.applied
    assert decision.reason == "block-sparse, 2 heads, blocks of 8 x 8 tokens"
    assert graph.nodes(SDPA) == []
    assert len(graph.nodes(BLOCK_SPARSE)) == H
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    assert specs == [BlockLists(decision.node, 0), BlockLists(decision.node, 1)]


def test_full_lists_are_dense_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    graph.run(SelectSparsePattern(), sparse=choice(graph))
    graph.assert_lossless(graph.result(lists(full())))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_lists_choose_blocks_by_head(harness: Any, scale: float | None) -> None:
    keep = full()
    keep[0, 0, :, 1] = False
    keep[0, 1] = torch.eye(3, dtype=torch.bool)
    mask = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    graph = harness(Attention(scale=scale), tokens())
    graph.run(SelectSparsePattern(), sparse=choice(graph))
    out = graph.result(lists(keep))
    graph.module.arguments["attn_mask"] = mask
    graph.assert_lossless(out)


def test_a_skipped_head_gives_zeros(harness: Any) -> None:
    keep = full()
    keep[0, 1] = False
    graph = harness(Attention(), tokens())
    graph.run(SelectSparsePattern(), sparse=choice(graph))
    out = graph.result(lists(keep)).unflatten(-1, (H, D))
    assert out[:, :, 1].count_nonzero() == 0
    assert out[:, :, 0].count_nonzero() > 0


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = choice(graph)
    graph.run(SelectSparsePattern(), sparse=wanted)
    assert graph.run(SelectSparsePattern(), sparse=wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(SelectSparsePattern(), sparse=choice(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


def test_after_fuse_projections_the_operands_are_parts_of_one_product(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    decisions = graph.run(FuseProjections(), SelectSparsePattern(), sparse=choice(graph))
    assert [d.applied for d in decisions] == [True] * 4
    assert len(graph.nodes(torch.ops.aten.linear.default)) == 1
    graph.assert_lossless(graph.result(lists(full())))


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
    (decision,) = graph.run(SelectSparsePattern(), sparse=choice(graph, heads))
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


class Bare(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.dim() == 4)


def test_declined_for_operands_of_three_dimensions(harness: Any) -> None:
    graph = harness(Bare(), *(torch.randn(H, N, D) for _ in "qkv"))
    (decision,) = graph.run(SelectSparsePattern(), sparse=choice(graph))
    assert decision.reason == "the attention's operands are not [B, H, N, D]"


def test_declined_for_grouped_queries(harness: Any) -> None:
    graph = harness(Bare(), torch.randn(1, H, N, D), *(torch.randn(1, 1, N, D) for _ in "kv"))
    (decision,) = graph.run(SelectSparsePattern(), sparse=choice(graph))
    assert decision.reason == "q and k have different numbers of heads"


def test_a_wish_that_was_declined_before_is_reported(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (node,) = graph.nodes(SDPA)
    (decision,) = graph.run(SelectSparsePattern(), declined={node.name: "no grid"})
    assert (decision.node, decision.applied, decision.reason) == (node.name, False, "no grid")


def test_without_a_wish_nothing_is_said(harness: Any) -> None:
    assert harness(Attention(), tokens()).run(SelectSparsePattern()) == []
