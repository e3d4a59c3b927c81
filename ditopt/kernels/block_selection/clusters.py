"""Clusters of queries and keys as an order of tokens and as a selector (SVG2, arXiv 2505.18875).

k-means groups similar queries and similar keys of each head. Tokens are sorted by cluster, so that
blocks hold tokens that attend alike; then each cluster of queries keeps the fewest clusters of keys
that hold a share of the mass, ``P = softmax(q centroid . k centroid * scale + log size)``. A block
keeps another if any of their clusters do, so the lists hold all kept pairs, and run on ordinary
blocks whatever the sizes of the clusters.

Centroids move little from step to step: start from the last ones and two iterations do, where a
cold start takes fifty. Plain PyTorch, no wait for the device; cost 4 N C D FLOPs per iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import from_blocks

from .reference import choose

_CHUNK = 8192  # tokens whose distances to all centroids exist at a time


def first_centroids(x: Tensor, count: int) -> Tensor:
    """Evenly spaced tokens of x [B, H, N, D] as [B, H, count, D], float32 or float64."""
    at = torch.arange(count, device=x.device) * x.shape[2] // count
    return x[:, :, at].to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every token, int64 [B, H, N]; the first of equally near ones."""
    offset = (centroids * centroids).sum(-1, keepdim=True).transpose(-1, -2) / 2
    parts = [
        (part.to(centroids.dtype) @ centroids.transpose(-1, -2) - offset).argmax(-1)
        for part in torch.split(x, _CHUNK, 2)
    ]
    return torch.cat(parts, 2)


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm from given centroids (squared Euclidean distance).

    Args:
        x: tokens [B, H, N, D].
        centroids: [B, H, C, D], of an earlier step or `first_centroids`.
        iterations: updates of the centroids; 0 assigns only.

    Returns:
        labels int64 [B, H, N] for the returned centroids, those, and tokens per cluster int64
        [B, H, C]. A cluster without tokens keeps its centroid.
    """
    for _ in range(iterations):
        labels = assign(x, centroids)
        totals = torch.zeros_like(centroids)
        where = labels[..., None].expand_as(x)
        totals.scatter_add_(2, where, x.to(centroids.dtype))
        sizes = _sizes(labels, centroids.shape[2])[..., None]
        centroids = torch.where(sizes > 0, totals / sizes.clamp(min=1), centroids)
    labels = assign(x, centroids)
    return labels, centroids, _sizes(labels, centroids.shape[2])


def _sizes(labels: Tensor, count: int) -> Tensor:
    sizes = torch.zeros(*labels.shape[:2], count, dtype=torch.int64, device=labels.device)
    return sizes.scatter_add_(2, labels, torch.ones_like(labels))


def cluster_order(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens sorted by cluster and the inverse, int64 [B, H, N]; in a cluster they keep order."""
    order = labels.argsort(dim=-1, stable=True)
    return order, order.argsort(-1)


def select_clusters(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_sizes: Tensor,
    scale: float,
    mass: float,
    minimum: int = 1,
) -> Tensor:
    """Clusters of keys that each cluster of queries keeps, bool [B, H, Cq, Ck]; top-p."""
    scores = (q_centroids * scale) @ k_centroids.transpose(-1, -2)
    nothing = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    # The sizes differ by head: they enter as scores of clusters of one token each.
    weighted = scores + k_sizes[:, :, None].to(scores.dtype).log()
    ones = torch.ones_like(k_sizes[0, 0])
    keep = choose(weighted, ones, nothing, "top_p", mass, minimum)
    return keep & (k_sizes > 0)[:, :, None]


def cluster_lists(
    keep: Tensor, q_sizes: Tensor, k_sizes: Tensor, n_q: int, n_k: int, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """Lists over tokens in cluster order: counts [B, H, QB] and ids [B, H, QB, KB].

    Args:
        keep: bool [B, H, Cq, Ck].
        q_sizes: tokens of each cluster of queries [B, H, Cq].
        k_sizes: the same of keys.
        n_q: query tokens.
        n_k: key tokens.
        block_q: query tokens of a block.
        block_k: key tokens of a block.
    """
    rows = _members(q_sizes, n_q, block_q)
    columns = _members(k_sizes, n_k, block_k)
    # Counts of pairs of clusters: exact in float32.
    pairs = rows @ keep.to(rows.dtype) @ columns.transpose(-1, -2)
    return from_blocks(pairs > 0)


def _members(sizes: Tensor, n: int, block: int) -> Tensor:
    """Which clusters have tokens in which block, 0 or 1, float32 [B, H, blocks, C]."""
    ends = sizes.cumsum(-1)[:, :, None]
    starts = ends - sizes[:, :, None]
    begin = torch.arange(0, n, block, device=sizes.device)[:, None]
    inside = (starts < (begin + block).clamp(max=n)) & (ends > begin) & (ends > starts)
    return inside.float()
