"""Operators that choose an order of tokens for each head, and the lists of blocks in that order.

- ``ditopt::cluster_tokens``: tokens by cluster, and the clusters that attend (`clusters`, SVG2).
- ``ditopt::vote_order``: each head's sampled queries decide whether it is better served by one
  block pattern over the tokens as they stand or over the tokens in another order (Sparse VideoGen,
  arXiv 2502.01776: frame after frame for spatial heads, place after place for temporal ones).
- ``ditopt::take_tokens`` and ``ditopt::put_tokens``: tokens into an order, results back.

Orders are int64 [B, H, N]: which token stands at each place. Plain PyTorch, no wait for the device.
Centroids of an earlier step of the run are taken up where there are any (`reuse`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import from_blocks

from . import clusters
from .ops import fake_lists
from .reuse import active

_CLUSTER, _VOTE = "ditopt::cluster_tokens", "ditopt::vote_order"
_TAKE, _PUT = "ditopt::take_tokens", "ditopt::put_tokens"
torch.library.define(
    _CLUSTER,
    "(Tensor q, Tensor k, Tensor slot, int block_q, int block_k, int q_clusters, int k_clusters, "
    "int first, int later, float mass, float least, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    _VOTE,
    "(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor order, int block_q, int block_k, "
    "int samples, float scale) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(_TAKE, "(Tensor x, Tensor order) -> Tensor")
torch.library.define(_PUT, "(Tensor x, Tensor order) -> Tensor")


def _cluster(
    q: Tensor, k: Tensor, slot: Tensor, block_q: int, block_k: int, q_clusters: int,
    k_clusters: int, first: int, later: int, mass: float, least: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    counts = (min(q_clusters, q.shape[2]), min(k_clusters, k.shape[2]))
    kept, key = active(), (int(slot), q.shape, k.shape, "centroids")
    known = None if kept is None else kept.recall(key)
    if known is None:
        known = [clusters.first_centroids(x, n) for x, n in zip((q, k), counts, strict=True)]
        later = first
    found = [clusters.kmeans(x, c, later) for x, c in zip((q, k), known, strict=True)]
    (q_labels, q_centroids, q_sizes), (k_labels, k_centroids, k_sizes) = found
    if kept is not None:
        kept.remember(key, [q_centroids, k_centroids])
    minimum = max(1, round(least * counts[1]))
    keep = clusters.select_clusters(q_centroids, k_centroids, k_sizes, scale, mass, minimum)
    sizes = (q.shape[2], k.shape[2], block_q, block_k)
    lists = clusters.cluster_lists(keep, q_sizes, k_sizes, *sizes)
    orders = [labels.argsort(dim=-1, stable=True) for labels in (q_labels, k_labels)]
    return orders[0], orders[1], *lists


def _fake_cluster(
    q: Tensor, k: Tensor, slot: Tensor, block_q: int, block_k: int, q_clusters: int,
    k_clusters: int, first: int, later: int, mass: float, least: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    orders = (x.new_empty(x.shape[:3], dtype=torch.int64) for x in (q, k))
    return next(orders), next(orders), *fake_lists(q, k, block_q, block_k)


def votes(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, order: Tensor, block_q: int, block_k: int,
    samples: int, scale: float,
) -> Tensor:  # fmt: skip
    """Which heads are better off in `order`, bool [B, H].

    `samples` queries, evenly spaced, are computed three times: over all keys, over those that the
    blocks `keep` [QB, KB] hold as tokens stand, and over those that they hold in `order` [N]. The
    smaller squared error wins; a tie leaves the tokens as they stand. Cost: 3 samples / N of dense
    attention.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = torch.arange(min(samples, n_q), device=q.device) * n_q // min(samples, n_q)
    places = order.argsort()
    scores = (q[:, :, rows].to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    values = v.to(wide)
    dense = scores.softmax(-1) @ values
    errors = []
    for q_at, k_at in ((rows, torch.arange(n_k, device=q.device)), (places[rows], places)):
        seen = keep[q_at // block_q][:, k_at // block_k]
        # A query that sees nothing gives zeros, as the kernels do.
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        errors.append((weights @ values - dense).square().sum((2, 3)))
    return errors[1] < errors[0]


def _vote(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, order: Tensor, block_q: int, block_k: int,
    samples: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    moved = votes(q, k, v, keep, order, block_q, block_k, samples, scale)
    stands = torch.arange(q.shape[2], device=q.device)
    # One list for all heads: in the order that a head chose, its blocks are those of any other.
    return torch.where(moved[..., None], order, stands), *from_blocks(keep[None, None])


def _fake_vote(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, order: Tensor, block_q: int, block_k: int,
    samples: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = q.new_empty(q.shape[:3], dtype=torch.int64)
    counts, ids = (keep.new_empty(n, dtype=torch.int32) for n in (keep.shape[:1], keep.shape))
    return chosen, counts[None, None], ids[None, None]


def _take(x: Tensor, order: Tensor) -> Tensor:
    return torch.gather(x, 2, order[..., None].expand_as(x))


def _put(x: Tensor, order: Tensor) -> Tensor:
    out = _fake_put(x, order)  # as attention gives it: what follows in a DiT is then free
    return out.scatter_(2, order[..., None].expand_as(x), x)


def _fake_take(x: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_put(x: Tensor, order: Tensor) -> Tensor:
    batch, heads, n, d = x.shape
    return x.new_empty(batch, n, heads, d).transpose(1, 2)


for _name, _function, _fake in (
    (_CLUSTER, _cluster, _fake_cluster),
    (_VOTE, _vote, _fake_vote),
    (_TAKE, _take, _fake_take),
    (_PUT, _put, _fake_put),
):
    for _device in ("cpu", "cuda"):
        torch.library.impl(_name, _device)(_function)
    torch.library.register_fake(_name, _fake)
