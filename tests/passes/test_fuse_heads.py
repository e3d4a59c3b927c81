from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.block_sparse_attention import ops  # noqa: F401  (registers the operator)
from ditopt.passes.fuse_heads import FuseHeads
from ditopt.sites import SDPA

H, N, D, BLOCK = 2, 16, 8, 8
CALL = torch.ops.ditopt.block_sparse_attention.default
SCALE = D**-0.5


class PerHead(nn.Module):
    """Block-sparse attention head by head; `order` and `blocks` may differ from the usual."""

    def __init__(self, order: tuple[int, ...] = (0, 1), blocks: tuple[int, int] = (BLOCK, BLOCK)):
        super().__init__()
        self.order, self.blocks = order, blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        heads = [
            CALL(*(x[:, h : h + 1] for x in (q, k, v, counts, ids)), block, BLOCK, SCALE)
            for h, block in zip(self.order, self.blocks, strict=False)
        ]
        return torch.cat(heads, 1)


class OtherKeys(PerHead):
    """The second head reads keys of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        heads = [
            CALL(*(x[:, h : h + 1] for x in (q, keys, v, counts, ids)), BLOCK, BLOCK, SCALE)
            for h, keys in enumerate((k, k + 1))
        ]
        return torch.cat(heads, 1)


def inputs(heads: int = H) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, N, D, generator=generator) for _ in "qkv")
    counts = torch.ones(1, heads, 2, dtype=torch.int32)
    ids = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32).expand(1, heads, 2, 2).contiguous()
    return q, k, v, counts, ids


def test_all_heads_in_one_call(harness: Any) -> None:
    graph = harness(PerHead(), *inputs())
    (decision,) = graph.run(FuseHeads())
    assert (decision.applied, decision.reason) == (True, "2 heads in one launch")
    assert len(graph.nodes(CALL)) == 1
    assert graph.nodes(torch.ops.aten.cat.default) == []
    assert graph.nodes(torch.ops.aten.slice.Tensor) == []


def test_the_result_is_the_same_to_the_bit(harness: Any) -> None:
    graph = harness(PerHead(), *inputs())
    apart = graph.result()
    graph.run(FuseHeads())
    assert torch.equal(graph.result(), apart)


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(PerHead(), *inputs())
    graph.run(FuseHeads())
    assert graph.run(FuseHeads()) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(PerHead(), *inputs())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(FuseHeads())
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize(
    ("module", "heads", "reason"),
    [
        (PerHead(order=(1, 0)), 2, "the calls do not read consecutive heads"),
        (PerHead(), 3, "the calls do not cover all heads"),
        (PerHead(blocks=(BLOCK, BLOCK + 1)), 2, "the calls read different tensors or block sizes"),
        (OtherKeys(), 2, "the calls read different tensors or block sizes"),
    ],
    ids=["order", "some heads", "block sizes", "tensors"],
)
def test_declined(harness: Any, module: nn.Module, heads: int, reason: str) -> None:
    graph = harness(module, *inputs(heads))
    code = graph.gm.code
    (decision,) = graph.run(FuseHeads())
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


def test_other_concatenations_are_left_alone(harness: Any) -> None:
    class Cat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x + 1], 1)

    assert harness(Cat(), torch.randn(1, 2)).run(FuseHeads()) == []


class DenseHeads(nn.Module):
    """Heads 1 and 2 of four are dense."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        heads = []
        for h in range(4):
            part = [x[:, h : h + 1] for x in (q, k, v)]
            if h in (1, 2):
                heads.append(nn.functional.scaled_dot_product_attention(*part, scale=SCALE))
            else:
                lists = [x[:, h : h + 1] for x in (counts, ids)]
                heads.append(CALL(*part, *lists, BLOCK, BLOCK, SCALE))
        return torch.cat(heads, 1)


def test_dense_heads_stay_apart_in_one_call(harness: Any) -> None:
    graph = harness(DenseHeads(), *inputs(4))
    apart = graph.result()
    (decision,) = graph.run(FuseHeads())
    assert decision.reason == "2 heads block-sparse, 2 dense ones apart"
    assert len(graph.nodes(CALL)) == 2
    assert len(graph.nodes(SDPA)) == 1
    torch.testing.assert_close(graph.result(), apart)
    assert graph.run(FuseHeads()) == []
