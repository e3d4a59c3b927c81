from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.block_sparse_attention import pooling
from ditopt.kernels.block_sparse_attention import reference as sparse
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.passes.base import BlockBias, BlockLists, DroppedBlocks, OnlineChoice, SparseChoice
from ditopt.passes.fuse_heads import FuseHeads
from ditopt.passes.select_blocks_online import SelectBlocksOnline
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, SelectSparsePattern
from ditopt.passes.substitute_means import DROPPED, MEANS, WITH_POOLED, SubstituteMeans
from ditopt.sites import SDPA

H, N, D, BLOCK = 2, 29, 8, 8  # the last block has 5 tokens
ROWS = -(-N // BLOCK)
STATIC = (SelectSparsePattern(), FuseHeads(), SubstituteMeans())


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
    return 3 * torch.randn(1, N, H * D, generator=torch.Generator().manual_seed(2))


def wishes(graph: Any, **changes: Any) -> dict[str, Any]:
    (node,) = graph.nodes(SDPA)
    choice = SparseChoice(BLOCK, BLOCK, H, N, N, **changes)
    return {"sparse": {node.name: choice}, "means": frozenset({node.name})}


def lists() -> list[Tensor]:
    """Head 0 keeps the diagonal, head 1 nothing: it sees every block through its mean."""
    keep = torch.stack([torch.eye(ROWS, dtype=torch.bool), torch.zeros(ROWS, ROWS).bool()])
    return list(from_blocks(keep[None]))


def in_order(graph: Any, given: list[Tensor]) -> list[Tensor]:
    """The values of the further inputs, in the order of the graph's placeholders."""
    bias = pooling.log_lengths(N, BLOCK, None, torch.device("cpu"))
    bits = pooling.dropped_bits(given[0], given[1], ROWS, None)
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    other = {BlockBias: bias, DroppedBlocks: bits}
    return [given[s.part] if isinstance(s, BlockLists) else other[type(s)] for s in specs]


def by_hand(graph: Any, given: list[Tensor]) -> Tensor:
    """The reference in float64, from the definition: means of blocks weigh their lengths."""
    with torch.no_grad():
        q, k, v = (x.double() for x in graph.module.double().heads(graph.inputs[0].double()))
        graph.module.float()
        pooled = pooling.mean_substitute(k, v, *given, BLOCK)
        exact = sparse.block_sparse_attention_with_lse(
            q, k, v, *given, BLOCK, BLOCK, D**-0.5, pooled=pooled
        )[0]
    return exact.transpose(1, 2).flatten(-2)


def test_means_stand_for_the_blocks_that_are_left_out(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    decisions = graph.run(*STATIC, **wishes(graph))
    assert decisions[-1].applied
    assert decisions[-1].reason == ("the mean of each key block stands for it where it is left out")
    assert [len(graph.nodes(t)) for t in (BLOCK_SPARSE, WITH_POOLED, MEANS)] == [0, 1, 2]
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    site = decisions[-1].node
    further = {BlockBias(site), DroppedBlocks(site)}
    assert set(specs) == {BlockLists(site, 0), BlockLists(site, 1), *further}
    out = graph.result(in_order(graph, lists()))
    torch.testing.assert_close(out.double(), by_hand(graph, lists()), rtol=0, atol=2e-5)


def test_they_are_closer_to_dense_than_dropping(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    plain = harness(graph.module, tokens())
    graph.run(*STATIC, **wishes(graph))
    plain.run(*STATIC[:2], sparse=wishes(plain)["sparse"])
    with torch.no_grad():
        dense = graph.module(graph.inputs[0])
    diagonal = list(from_blocks(torch.eye(ROWS, dtype=torch.bool).expand(1, H, -1, -1)))
    means, dropped = graph.result(in_order(graph, diagonal)), plain.result(diagonal)
    assert float((means - dense).norm()) < 0.9 * float((dropped - dense).norm())


def test_nothing_left_out_is_dense_attention(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    graph.run(*STATIC, **wishes(graph))
    every = list(from_blocks(torch.ones(1, H, ROWS, ROWS, dtype=torch.bool)))
    graph.assert_lossless(graph.result(in_order(graph, every)))


def test_a_selector_s_bits_follow_its_lists(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (node,) = graph.nodes(SDPA)
    online = {node.name: OnlineChoice("top_k", 0.5, 1, BLOCK, BLOCK, H, N, N)}
    decisions = graph.run(
        SelectBlocksOnline(), SubstituteMeans(), online=online, means=frozenset({node.name})
    )
    assert [d.applied for d in decisions] == [True, True]
    assert [len(graph.nodes(t)) for t in (DROPPED, WITH_POOLED)] == [1, 1]
    forced = torch.eye(ROWS, dtype=torch.bool)
    bias = pooling.log_lengths(N, BLOCK, None, torch.device("cpu"))
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    out = graph.result([bias if isinstance(s, BlockBias) else forced for s in specs])
    with torch.no_grad():
        q, k, _ = graph.module.heads(graph.inputs[0])
        rule = ("top_k", 0.5, 1, D**-0.5)
        given = torch.ops.ditopt.select_blocks_pooled(q, k, forced, BLOCK, BLOCK, *rule)
    torch.testing.assert_close(out.double(), by_hand(graph, list(given)), rtol=0, atol=2e-5)


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph)
    graph.run(*STATIC, **wanted)
    assert graph.run(SubstituteMeans(), **wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(*STATIC, **wishes(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize("passes", [(), (SelectSparsePattern(),)], ids=["dense", "by head"])
def test_declined_without_one_launch_for_all_heads(harness: Any, passes: tuple[Any, ...]) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph)
    graph.run(SelectSparsePattern(), **wanted) if passes else None
    code = graph.gm.code
    (decision,) = graph.run(SubstituteMeans(), **wanted)
    assert (decision.applied, decision.reason) == (
        False,
        "the attention is not block-sparse in one launch",
    )
    assert graph.gm.code == code
