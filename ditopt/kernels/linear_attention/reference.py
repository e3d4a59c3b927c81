"""Linear attention on the remainder of a block-sparse attention: the specification.

Softmax attention weights are few large entries of high rank and many small ones of low rank, so SLA
(arXiv 2509.24006) computes the blocks on a list exactly and the others by linear attention:

    O = sparse(q, k, v; lists) + linear(q, k, v; not on the lists) W^T

with ``linear(q) = phi(q) S / (phi(q) . z)``, ``S = sum phi(k)^T v`` and ``z = sum phi(k)`` over the
tokens of the blocks that are not on the list of the query's block. phi is softmax over the
channels, elu + 1, or relu. W, for each head, is trained together with the model; with W = 0 the
result is the sparse attention. Where nothing is left, or phi(q) . z is 0, the linear part is 0.

Shapes and lists as in `block_sparse_attention.reference`. Accumulation in float32 (float64 for
float64). No training-free W is known to help (attention.md 4.25).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import to_blocks

FEATURES = ("softmax", "elu", "relu")


def feature(x: Tensor, name: str) -> Tensor:
    """Phi of [..., D], elementwise positive or zero."""
    if name == "softmax":
        return x.softmax(-1)
    if name == "elu":
        return torch.nn.functional.elu(x) + 1
    if name == "relu":
        return x.relu()
    raise ValueError(f"feature: must be one of {', '.join(FEATURES)}, got {name!r}")


def remainder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    phi: str,
) -> Tensor:
    """The linear part before W, [B, H, N_q, D] in q's dtype, pair by pair: 4 D N_q N_k FLOPs."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    n_q, n_k = q.shape[2], k.shape[2]
    keep = to_blocks(kv_num_blocks, kv_indices, -(-n_k // block_k))
    kept = keep.repeat_interleave(block_q, 2)[:, :, :n_q].repeat_interleave(block_k, 3)[..., :n_k]
    features = (feature(x.to(accumulate), phi) for x in (q, k))
    weights = (next(features) @ next(features).transpose(-1, -2)).masked_fill(kept, 0.0)
    total = weights.sum(-1, keepdim=True)
    out = weights @ v.to(accumulate)
    return torch.where(total > 0, out / total.where(total > 0, 1.0), 0.0).to(q.dtype)


def project(linear: Tensor, weight: Tensor) -> Tensor:
    """``linear W^T`` for [B, H, N, D] and W [H, D, D], in the tensor's dtype."""
    return linear @ weight.to(linear.dtype).transpose(-1, -2)
