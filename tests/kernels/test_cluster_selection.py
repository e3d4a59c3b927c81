"""Clusters as order and selector, and the reuse of lists over steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditopt.kernels.block_selection import clusters
from ditopt.kernels.block_selection.reuse import Kept, active, keeping
from ditopt.kernels.block_sparse_attention import reference as block_sparse
from ditopt.kernels.block_sparse_attention.api import validate_lists
from ditopt.kernels.block_sparse_attention.lists import to_blocks

B, H, N, D, C = 2, 2, 70, 8, 5


def grouped(seed: int = 0, groups: int = C, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    """Tokens around well separated centres, shuffled, and the true group of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(B, H, groups, D, generator=generator, dtype=torch.float64)
    group = torch.randint(0, groups, (B, H, N), generator=generator)
    group[..., :groups] = torch.arange(groups)
    noise = torch.randn(B, H, N, D, generator=generator, dtype=torch.float64)
    return centres.gather(2, group[..., None].expand(-1, -1, -1, D)) + spread * noise, group


def cost(x: Tensor, centroids: Tensor) -> float:
    return float(torch.cdist(x, centroids).amin(-1).square().sum())


def test_tokens_go_to_the_nearest_centroid() -> None:
    x, _ = grouped()
    centroids = torch.randn(B, H, C, D, dtype=torch.float64)
    assert torch.equal(clusters.assign(x, centroids), torch.cdist(x, centroids).argmin(-1))


def test_long_inputs_are_assigned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = grouped()
    whole = clusters.assign(x, clusters.first_centroids(x, C))
    monkeypatch.setattr(clusters, "_CHUNK", 7)
    assert torch.equal(clusters.assign(x, clusters.first_centroids(x, C)), whole)


def test_iterations_lower_the_cost_and_find_separated_groups() -> None:
    x, group = grouped()
    start = x[:, :, :C]  # one token of each group
    costs = [cost(x, clusters.kmeans(x, start, steps)[1]) for steps in range(4)]
    assert costs == sorted(costs, reverse=True)
    labels, centroids, sizes = clusters.kmeans(x, start, 3)
    assert torch.equal(labels, group)
    assert torch.equal(sizes.sum(-1), torch.full((B, H), N))
    for c in range(C):
        torch.testing.assert_close(centroids[0, 0, c], x[0, 0, group[0, 0] == c].mean(0))


def test_an_empty_cluster_keeps_its_centroid() -> None:
    x, _ = grouped()
    far = torch.cat([x[:, :, :2], torch.full((B, H, 1, D), 1e3, dtype=x.dtype)], 2)
    _, centroids, sizes = clusters.kmeans(x, far, 2)
    assert torch.equal(centroids[:, :, 2], far[:, :, 2])
    assert not bool(sizes[:, :, 2].any())


def test_a_warm_start_is_where_the_last_step_ended() -> None:
    x, _ = grouped()
    _, centroids, _ = clusters.kmeans(x, x[:, :, :C], 10)
    moved = x + 0.01
    warm = clusters.kmeans(moved, centroids, 1)
    cold = clusters.kmeans(moved, moved[:, :, :C], 10)
    torch.testing.assert_close(warm[1], cold[1])


def test_attention_in_cluster_order_is_attention() -> None:
    q, k = grouped(0)[0], grouped(1)[0]
    v = torch.randn(B, H, N, D, dtype=torch.float64)
    orders = [
        clusters.cluster_order(clusters.kmeans(x, clusters.first_centroids(x, C), 2)[0])
        for x in (q, k)
    ]
    (q_order, q_back), (k_order, _) = orders

    def gather(x: Tensor, order: Tensor) -> Tensor:
        return x.gather(2, order[..., None].expand_as(x))

    out = scaled_dot_product_attention(gather(q, q_order), gather(k, k_order), gather(v, k_order))
    dense = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(gather(out, q_back), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 8), (128, 128)])
def test_lists_hold_every_pair_of_kept_clusters(block_q: int, block_k: int) -> None:
    q, k = grouped(0)[0], grouped(1)[0]
    q_found, k_found = (clusters.kmeans(x, x[:, :, :C], 3) for x in (q, k))
    keep = clusters.select_clusters(q_found[1], k_found[1], k_found[2], 0.3, 0.6)
    sizes = (q_found[2], k_found[2], N, N)
    counts, ids = clusters.cluster_lists(keep, *sizes, block_q, block_k)
    validate_lists(counts, ids, N, N, block_q, block_k)
    kept = to_blocks(counts, ids, -(-N // block_k))
    q_labels, k_labels = (found[0].sort(-1).values for found in (q_found, k_found))
    for b in range(B):
        for h in range(H):
            tokens = keep[b, h][q_labels[b, h]][:, k_labels[b, h]]
            for i, rows in enumerate(tokens.split(block_q)):
                for j, pairs in enumerate(rows.split(block_k, 1)):
                    assert bool(pairs.any()) == bool(kept[b, h, i, j])


def test_top_p_over_clusters_counts_their_tokens() -> None:
    q_centroids = torch.zeros(1, 1, 1, 4)
    k_sizes = torch.tensor([[[60, 30, 10, 0]]])
    found = clusters.select_clusters(q_centroids, torch.randn(1, 1, 4, 4), k_sizes, 1.0, 0.85)
    assert found[0, 0, 0].tolist() == [True, True, False, False]
    everything = clusters.select_clusters(q_centroids, torch.randn(1, 1, 4, 4), k_sizes, 1.0, 1.0)
    assert everything[0, 0, 0].tolist() == [True, True, True, False]


def test_kept_clusters_attend_almost_like_all() -> None:
    """Peaked attention between groups: a third of the clusters hold 95% of the mass."""
    q = grouped(0)[0]
    k = q.clone()
    v = torch.randn(B, H, N, D, dtype=torch.float64)
    labels, centroids, sizes = clusters.kmeans(q, q[:, :, :C], 3)
    order, back = clusters.cluster_order(labels)
    keep = clusters.select_clusters(centroids, centroids, sizes, 0.5, 0.95)
    assert float(keep.float().mean()) < 0.5
    lists = clusters.cluster_lists(keep, sizes, sizes, N, N, 8, 8)
    q_in, k_in, v_in = (x.gather(2, order[..., None].expand_as(x)) for x in (q, k, v))
    out = block_sparse.block_sparse_attention(q_in, k_in, v_in, *lists, 8, 8, 0.5)
    out = out.gather(2, back[..., None].expand_as(out))
    dense = scaled_dot_product_attention(q, k, v, scale=0.5)
    assert float((out - dense).norm() / dense.norm()) < 0.1


def test_reuse_counts_computed_steps_by_key() -> None:
    kept, made = Kept(), []

    def choose() -> tuple[Tensor, Tensor]:
        made.append(len(made))
        return torch.tensor(len(made)), torch.tensor(0)

    ages = []
    for step in range(8):
        if step in (2, 3):
            continue  # a step that a cache skips does not come here
        ages.append(int(kept.lists(("site", "cond"), 3, choose)[0]))
    assert ages == [1, 1, 1, 2, 2, 2]
    assert int(kept.lists(("site", "uncond"), 3, choose)[0]) == 3
    assert int(kept.lists(("site", "cond"), 3, choose)[0]) == 4
    kept.clear()
    assert int(kept.lists(("site", "cond"), 3, choose)[0]) == 5


def test_reuse_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="every: must be positive, got 0"):
        Kept().lists("site", 0, lambda: (torch.tensor(0), torch.tensor(0)))


def test_values_are_kept_while_they_are_active() -> None:
    kept = Kept()
    assert active() is None
    with keeping(kept):
        assert active() is kept
        with keeping(None):
            assert active() is None
        kept.remember("site", 3)
    assert active() is None
    assert (kept.recall("site"), kept.recall("other")) == (3, None)
    kept.clear()
    assert kept.recall("site") is None
