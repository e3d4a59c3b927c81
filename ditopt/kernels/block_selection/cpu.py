"""Exact block mass on a CPU: the softmax of a few query rows at a time, summed by key block.

`reference.block_mass` with the call's own log-sum-exp, without it and without a map of all pairs:
what exists at a time stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_BYTES = 4 << 20


def softmax_mass(q: Tensor, k: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    """Softmax mass of each block, [B, H, QB, KB]; float32, float64 for float64.

    Cost: 2 D FLOPs and one exponential per pair of tokens.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    rows, columns = -(-n_q // block_q), -(-n_k // block_k)
    mass = q.new_empty(batch, heads, rows, columns, dtype=accumulate)
    at_once = max(1, _TILE_BYTES // (mass.element_size() * n_k * block_q))
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h].to(accumulate).transpose(0, 1)
            for first in range(0, rows, at_once):
                tile = q[b, h, first * block_q : (first + at_once) * block_q].to(accumulate)
                share = torch.softmax((tile * scale) @ keys, -1)
                missing = (0, -n_k % block_k, 0, -tile.shape[0] % block_q)
                if any(missing):
                    share = torch.nn.functional.pad(share, missing)
                by_key = share.view(-1, columns, block_k).sum(-1)
                found = by_key.view(-1, block_q, columns).sum(1)
                mass[b, h, first : first + found.shape[0]] = found
    return mass
