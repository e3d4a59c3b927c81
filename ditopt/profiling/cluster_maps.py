"""How concentrated attention is between clusters of queries and of keys (SVG2, arXiv 2505.18875).

A head that looks for content has no structure in raster order: tokens that attend alike are
scattered. k-means groups the queries and the keys of each head, and the exact mass between the
groups says how little a selection of clusters could keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_selection.clusters import first_centroids, kmeans
from ditopt.profiling.maps import RECALL_LEVELS

_CLUSTERS = 32
_ITERATIONS = 5
_ROWS = 256  # queries whose scores exist at a time


@torch.no_grad()
def cluster_recall(
    q: Tensor, k: Tensor, scale: float, levels: tuple[float, ...] = RECALL_LEVELS
) -> Tensor:
    """Kept share of (query, key) pairs that holds each level of the attention, float32 [H, R].

    Args:
        q: [B, H, N_q, D], any floating dtype; computed in float32.
        k: [B, H, N_k, D].
        scale: factor of the scores.
        levels: shares of the attention.

    Returns:
        Mean over the batch, on the CPU. Cost: the scores of a dense attention, and 2 C FLOPs per
        pair of tokens for C clusters.
    """
    found = [
        _recall_of_head(q[:, h : h + 1].float() * scale, k[:, h : h + 1].float(), levels)
        for h in range(q.shape[1])
    ]
    return torch.stack(found).float().cpu()


def _recall_of_head(q: Tensor, k: Tensor, levels: tuple[float, ...]) -> Tensor:
    """[R] of scaled queries and keys [B, 1, N, D]."""
    count = min(_CLUSTERS, q.shape[2], k.shape[2])
    q_labels, _, q_sizes = kmeans(q, first_centroids(q, count), _ITERATIONS)
    k_labels, _, k_sizes = kmeans(k, first_centroids(k, count), _ITERATIONS)
    members = torch.nn.functional.one_hot(k_labels, count).to(q.dtype)
    mass = q.new_zeros(*q.shape[:2], count, count)
    for start in range(0, q.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        weights = (q[:, :, rows] @ k.transpose(-1, -2)).softmax(-1)
        to_clusters = weights @ members
        mass.scatter_add_(2, q_labels[:, :, rows, None].expand_as(to_clusters), to_clusters)
    area = (q_sizes[..., :, None] * k_sizes[..., None, :]).double().flatten(2)
    share = area / (q.shape[2] * k.shape[2])
    return _least_share(mass.double().flatten(2), share, levels).mean(dim=(0, 1))


def _least_share(mass: Tensor, share: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Smallest summed share of pairs of clusters [..., P] that hold each level of the mass."""
    order = (mass / share.clamp(min=1e-30)).argsort(dim=-1, descending=True, stable=True)
    held, kept = (x.gather(-1, order).cumsum(-1) for x in (mass, share))
    wanted = held[..., -1:] * torch.tensor(levels, dtype=torch.float64, device=mass.device)
    last = torch.searchsorted(held, wanted).clamp(max=mass.shape[-1] - 1)
    return kept.gather(-1, last)
