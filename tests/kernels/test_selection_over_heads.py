"""Rules over whole heads, the operator that keeps lists, and orders of tokens by head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_selection import (
    clusters,
    cpu,
    ops_kept,
    ops_orders,
    reference,
    whole_heads,
)
from ditopt.kernels.block_selection.reuse import Kept, keeping
from ditopt.kernels.block_sparse_attention import reference as block_sparse
from ditopt.kernels.block_sparse_attention.lists import from_blocks, to_blocks

B, H, N, D, BLOCK = 1, 4, 70, 8, 16  # the last block has 6 tokens
ROWS = -(-N // BLOCK)
EYE = torch.eye(ROWS, dtype=torch.bool)
NONE = torch.zeros(ROWS, ROWS, dtype=torch.bool)
SCALE = D**-0.5
SLOT = torch.tensor(7)


def qkv(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(B, H, N, D, generator=generator, dtype=dtype) for _ in range(3)]


def peaked(heads: int, sharp: int, blocks: int = 10) -> Tensor:
    """Scores of block mass: the first `sharp` heads have one block that holds nearly all."""
    scores = torch.zeros(1, heads, blocks, blocks)
    scores[:, :sharp] += 12 * torch.eye(blocks)
    return scores


def densities(keep: Tensor) -> list[float]:
    return keep.float().mean((0, 2, 3)).tolist()


@pytest.mark.parametrize(
    ("sharp", "expected"),
    [
        (0, [0.4] * 4),
        (1, [0.2, 0.4, 0.4, 0.6]),
        (2, [0.2, 0.2, 0.6, 0.6]),
        (3, [0.2, 0.4, 0.4, 0.6]),
        (4, [0.4] * 4),
    ],
)
def test_sharp_heads_give_budget_to_flat_ones(sharp: int, expected: list[float]) -> None:
    forced = torch.zeros(10, 10, dtype=torch.bool)
    keep = whole_heads.choose(peaked(4, sharp), torch.ones(10), forced, "adaptive", 0.4, 1)
    assert sorted(densities(keep)) == pytest.approx(sorted(expected))


@given(st.floats(0.01, 1.0), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_percentile_is_one_threshold_for_a_head(density: float, minimum: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, H, 6, 6, generator=generator, dtype=torch.float64)
    lengths, forced = torch.ones(6), torch.zeros(6, 6, dtype=torch.bool)
    keep = whole_heads.choose(scores, lengths, forced, "percentile", density, minimum)
    share = scores.softmax(-1)
    assert int(keep.sum(-1).min()) >= minimum
    for head in range(H):
        wanted = math.ceil(density * 36)
        best = share[0, head].flatten().topk(wanted).indices
        by_threshold = torch.zeros(36, dtype=torch.bool)
        by_threshold[best] = True
        assert bool(keep[0, head].flatten()[best].all())
        extra = keep[0, head] & ~by_threshold.view(6, 6)
        # Beyond the threshold only what brings a row to its minimum.
        assert bool((extra.sum(-1) <= minimum).all())
        assert bool((keep[0, head].sum(-1)[extra.any(-1)] <= minimum).all())


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k, top_p, threshold, adaptive, percentile"):
        whole_heads.choose(peaked(1, 0), torch.ones(10), torch.zeros(10, 10).bool(), "best", 1, 1)


def select(q: Tensor, k: Tensor, scores: str, rule: str, amount: float, refresh: int = 1) -> Tensor:
    options = (scores, BLOCK, BLOCK, rule, amount, 1, SCALE, refresh)
    lists = torch.ops.ditopt.select_blocks(q, k, EYE, SLOT, *options)
    return to_blocks(*lists, ROWS)


@pytest.mark.parametrize("rule", ["top_k", "top_p"])
def test_exact_mass_is_that_of_the_softmax(rule: str) -> None:
    q, k, _ = qkv()
    scores = (q @ k.transpose(-1, -2)) * SCALE
    settings = (EYE, BLOCK, BLOCK, rule, 0.5, 1, SCALE)
    exact = reference.select_mass(q, k, scores.logsumexp(-1), *settings)
    assert torch.equal(select(q, k, "mass", rule, 0.5), to_blocks(*exact, ROWS))


def test_the_log_sum_exp_of_the_kernel_is_exact() -> None:
    q, k, _ = qkv(dtype=torch.float32)
    expected = ((q.double() @ k.double().transpose(-1, -2)) * SCALE).logsumexp(-1)
    found = ops_kept.dense_lse(q, k, BLOCK, BLOCK, SCALE)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tile", [1, 3 * 8 * N * BLOCK, 1 << 30])
@pytest.mark.parametrize(("n_q", "n_k"), [(N, N), (64, N), (N, 5)])
def test_the_mass_of_a_cpu_is_the_reference_s(
    monkeypatch: pytest.MonkeyPatch, tile: int, n_q: int, n_k: int
) -> None:
    monkeypatch.setattr(cpu, "_TILE_BYTES", tile)
    q, k, _ = qkv()
    q, k = q[:, :, :n_q], k[:, :, :n_k]
    lse = ((q @ k.transpose(-1, -2)) * SCALE).logsumexp(-1)
    expected = reference.block_mass(q, k, lse, BLOCK, BLOCK, SCALE)
    torch.testing.assert_close(cpu.softmax_mass(q, k, BLOCK, BLOCK, SCALE), expected)


@pytest.mark.parametrize("scores", ["pooled", "mass"])
def test_lists_serve_several_computed_steps(scores: str) -> None:
    first, later = qkv(0), qkv(1)
    young, old = (select(*x[:2], scores, "top_k", 0.5) for x in (first, later))
    assert not torch.equal(young, old)
    with keeping(Kept()):
        found = [select(*x[:2], scores, "top_k", 0.5, refresh=2) for x in (first, later, later)]
    assert [torch.equal(x, young) for x in found] == [True, True, False]
    assert torch.equal(found[2], old)


def test_kept_lists_are_not_the_caller_s() -> None:
    q, k, _ = qkv()
    options = ("pooled", BLOCK, BLOCK, "top_k", 0.5, 1, SCALE, 9)
    with keeping(Kept()):
        lists = torch.ops.ditopt.select_blocks(q, k, EYE, SLOT, *options)
        expected = [x.clone() for x in lists]
        for x in lists:
            x.zero_()
        again = torch.ops.ditopt.select_blocks(q, k, EYE, SLOT, *options)
    assert all(torch.equal(x, y) for x, y in zip(again, expected, strict=True))


CLUSTERED = (SLOT, BLOCK, BLOCK, 5, 6, 4, 1, 0.9, 0.1, SCALE)


def test_clusters_with_all_the_mass_are_dense_attention() -> None:
    q, k, v = qkv()
    settings = (*CLUSTERED[:7], 1.0, *CLUSTERED[8:])
    q_order, k_order, *lists = torch.ops.ditopt.cluster_tokens(q, k, *settings)
    moved = [ops_orders._take(x, o) for x, o in ((q, q_order), (k, k_order), (v, k_order))]
    out = block_sparse.block_sparse_attention(*moved, *lists, BLOCK, BLOCK, SCALE)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(torch.ops.ditopt.put_tokens(out, q_order), dense)


def test_clusters_start_from_the_last_step_s_centroids() -> None:
    q, k, _ = qkv()
    kept = Kept()
    with keeping(kept):
        torch.ops.ditopt.cluster_tokens(q, k, *CLUSTERED)
        torch.ops.ditopt.cluster_tokens(q, k, *CLUSTERED)
    first = clusters.first_centroids(q, 5)
    expected = clusters.kmeans(q, first, 5)[1]  # four iterations, then one more
    found = kept.recall((7, q.shape, k.shape, "centroids"))[0]
    torch.testing.assert_close(found, expected)


def test_more_clusters_than_tokens_are_as_many() -> None:
    q, k, _ = qkv()
    settings = (SLOT, BLOCK, BLOCK, 500, 500, 1, 1, 0.9, 0.1, SCALE)
    q_order, _, counts, _ = torch.ops.ditopt.cluster_tokens(q, k, *settings)
    assert torch.equal(q_order.sort(-1).values, torch.arange(N).expand(B, H, N))
    assert int(counts.min()) >= 1


def far_and_near() -> tuple[list[Tensor], Tensor]:
    """Head 0 attends to its neighbours, head 1 to the same place of other frames; 8 x 8 tokens."""
    frames = places = 8
    order = torch.arange(64).view(frames, places).T.flatten()  # place by place
    frame, place = torch.arange(64) // places, torch.arange(64) % places
    codes = []
    for axis in (frame, place):
        one_hot = torch.nn.functional.one_hot(axis, 8).double()
        codes.append(8 * one_hot)
    q = k = torch.stack(codes)[None]
    v = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [q, k, v], order


def test_queries_vote_for_the_order_that_errs_less() -> None:
    (q, k, v), order = far_and_near()
    keep = torch.eye(8, dtype=torch.bool)
    moved = ops_orders.votes(q, k, v, keep, order, 8, 8, 16, 1.0)
    assert moved.tolist() == [[False, True]]
    orders, counts, ids = torch.ops.ditopt.vote_order(q, k, v, keep, order, 8, 8, 16, 1.0)
    assert torch.equal(orders[0, 0], torch.arange(64))
    assert torch.equal(orders[0, 1], order)
    taken = [torch.ops.ditopt.take_tokens(x, orders) for x in (q, k, v)]
    out = block_sparse.block_sparse_attention(*taken, counts, ids, 8, 8, 1.0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(torch.ops.ditopt.put_tokens(out, orders), dense)


def test_a_tie_leaves_tokens_as_they_stand() -> None:
    q, k, v = qkv()
    every = torch.ones(ROWS, ROWS, dtype=torch.bool)
    backwards = torch.arange(N).flip(0)
    assert not ops_orders.votes(q, k, v, every, backwards, BLOCK, BLOCK, 8, SCALE).any()


def test_put_undoes_take() -> None:
    x = qkv()[0]
    order = torch.rand(B, H, N, generator=torch.Generator().manual_seed(1)).argsort(-1)
    taken = torch.ops.ditopt.take_tokens(x, order)
    assert torch.equal(taken[0, 2, 5], x[0, 2, order[0, 2, 5]])
    back = torch.ops.ditopt.put_tokens(taken, order)
    assert torch.equal(back, x)
    assert back.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["select", "cluster", "vote", "take", "put", "bits"])
def test_operators_are_well_formed(name: str) -> None:
    q, k, v = qkv(dtype=torch.float32)
    order = torch.arange(N).flip(0)
    cases = {
        "select": ("select_blocks", (q, k, EYE, SLOT, "mass", BLOCK, BLOCK, "adaptive", 0.5, 1,
                                     SCALE, 2)),
        "cluster": ("cluster_tokens", (q, k, *CLUSTERED)),
        "vote": ("vote_order", (q, k, v, EYE, order, BLOCK, BLOCK, 8, SCALE)),
        "take": ("take_tokens", (q, order.expand(B, H, N).contiguous())),
        "put": ("put_tokens", (q, order.expand(B, H, N).contiguous())),
        "bits": ("dropped_bits", from_blocks(EYE[None, None])),
    }  # fmt: skip
    operator, arguments = cases[name]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.ditopt, operator).default, arguments, test_utils=tests)
