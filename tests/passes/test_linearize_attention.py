from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.block_sparse_attention import reference as sparse
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.kernels.linear_attention import reference
from ditopt.passes.base import OnlineChoice, RemainderChoice, RemainderProjection, SparseChoice
from ditopt.passes.fuse_heads import FuseHeads
from ditopt.passes.linearize_attention import REMAINDER, LinearizeAttention
from ditopt.passes.select_blocks_online import SelectBlocksOnline
from ditopt.passes.select_sparse_pattern import SelectSparsePattern
from ditopt.sites import SDPA

H, N, D, BLOCK = 2, 24, 8, 8
STATIC = (SelectSparsePattern(), FuseHeads(), LinearizeAttention())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(H * D, H * D) for _ in "qkv")

    def heads(self, x: Tensor) -> list[Tensor]:
        layers = (self.to_q, self.to_k, self.to_v)
        return [layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(-2)


def tokens() -> Tensor:
    return torch.randn(1, N, H * D, generator=torch.Generator().manual_seed(2))


def wishes(graph: Any, shape: tuple[int, ...] = (H, D, D)) -> dict[str, Any]:
    (node,) = graph.nodes(SDPA)
    return {
        "sparse": {node.name: SparseChoice(BLOCK, BLOCK, H, N, N)},
        "remainders": {node.name: RemainderChoice("softmax", shape)},
    }


def diagonal() -> list[Tensor]:
    return list(from_blocks(torch.eye(3, dtype=torch.bool).expand(1, H, 3, 3)))


def test_the_linear_part_is_added_to_the_sparse_one(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    decisions = graph.run(*STATIC, **wishes(graph))
    assert decisions[-1].applied
    assert decisions[-1].reason == "linear attention of softmax features on the blocks left out"
    assert len(graph.nodes(REMAINDER)) == 1
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    assert specs[-1] == RemainderProjection(decisions[-1].node, torch.float32)
    weight = torch.randn(H, D, D, generator=torch.Generator().manual_seed(3))
    out = graph.result([*diagonal(), weight])
    with torch.no_grad():
        q, k, v = (x.double() for x in graph.module.double().heads(graph.inputs[0].double()))
        lists = (*diagonal(), BLOCK, BLOCK)
        linear = reference.remainder(q, k, v, *lists, "softmax")
        exact = sparse.block_sparse_attention(q, k, v, *lists, D**-0.5)
        expected = (exact + reference.project(linear, weight)).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_without_weights_it_is_the_sparse_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph)
    graph.run(*STATIC, **wanted)
    out = graph.result([*diagonal(), torch.zeros(H, D, D)])
    plain = harness(graph.module, tokens())
    plain.run(SelectSparsePattern(), FuseHeads(), sparse=wanted["sparse"])
    assert torch.equal(out, plain.result(diagonal()))


def test_it_follows_a_selector(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (node,) = graph.nodes(SDPA)
    online = {node.name: OnlineChoice("top_k", 0.5, 1, BLOCK, BLOCK, H, N, N)}
    remainders = wishes(graph)["remainders"]
    passes = (SelectBlocksOnline(), LinearizeAttention())
    decisions = graph.run(*passes, online=online, remainders=remainders)
    assert [d.applied for d in decisions] == [True, True]
    assert len(graph.nodes(REMAINDER)) == 1


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph)
    graph.run(*STATIC, **wanted)
    assert graph.run(LinearizeAttention(), **wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(*STATIC, **wishes(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


def test_declined_for_dense_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    code = graph.gm.code
    (decision,) = graph.run(LinearizeAttention(), remainders=wishes(graph)["remainders"])
    assert (decision.applied, decision.reason) == (
        False,
        "the attention is not block-sparse in one launch",
    )
    assert graph.gm.code == code


@pytest.mark.parametrize("shape", [(D, D), (H, D, D + 1)])
def test_declined_for_a_projection_of_another_shape(harness: Any, shape: tuple[int, ...]) -> None:
    graph = harness(Attention(), tokens())
    decision = graph.run(*STATIC, **wishes(graph, shape))[-1]
    assert decision.reason == (
        f"the plan's projection is {list(shape)}, the attention needs "
        f"[heads, channels, channels] = {[H, D, D]}"
    )
