"""Tokens that stand for dropped key blocks: their means, and which query blocks need them.

Dropping key block j from a softmax gives its mass to the kept keys. Instead its n tokens can be
represented by one: with k_t = m + e_t around the block's mean m, sum_t e_t = 0 and scores s q.k,

    sum_t exp(s q.k_t) = n exp(s q.m) (1 + mean_t((s q.e_t)^2) / 2 + ...),
    sum_t exp(s q.k_t) v_t = n exp(s q.m) (mean(v) + s mean_t((q.e_t) v_t) + ...),

so one token with the mean key, the mean value and log(n) added to its score is exact to first order
in the spread of the scores for the mass and to zeroth order for the direction; by Jensen it never
overestimates the mass. It needs no weights and no training. Source: Sol-Attn, arXiv 2607.24027;
attention.md 4.11 and A6. Pooled tokens of several levels (LLSA, arXiv 2512.16615) that are *listed*
rather than everything but the list are ordinary key blocks with a ``key_bias`` of log(weight):
append them to the keys.

dtype: means accumulate in float32 (float64 for float64) and are stored in the input's. Cost: K and
V are read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lists import WORD, Partial, Pooled, pack_bits, to_blocks

_NAME = "ditopt::block_means"
_BITS = "ditopt::dropped_bits"
torch.library.define(_NAME, "(Tensor x, int block, Tensor? lengths=None) -> Tensor")
torch.library.define(_BITS, "(Tensor kv_num_blocks, Tensor kv_indices) -> Tensor")


def _place_weights(n: int, block: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Bool [ceil(n / block), block]: which tokens of each block exist."""
    count = -(-n // block)
    place = torch.arange(count * block, device=device).view(count, block)
    exists = place < n
    if lengths is not None:
        exists &= place % block < lengths[:, None]
    return exists


def _means(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    exists = _place_weights(x.shape[2], block, lengths, x.device)
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block)).contiguous()
    blocks = blocks.view(*x.shape[:2], -1, block, x.shape[-1])
    total = torch.where(exists[..., None], blocks.to(accumulate), 0.0).sum(3)
    means: Tensor = total / exists.sum(-1).clamp(min=1)[:, None]
    return means.to(x.dtype)


def _cuda(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float64:
        return _means(x, block, lengths)
    from . import triton_means  # Triton is imported on the first launch only

    return triton_means.block_means(x, block, lengths)


def _fake(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    batch, heads, n, d = x.shape
    return x.new_empty(batch, heads, (n + block - 1) // block, d)


torch.library.impl(_NAME, "cpu", _means)
torch.library.impl(_NAME, "cuda", _cuda)
torch.library.register_fake(_NAME, _fake)


def _setup(ctx: Any, inputs: tuple[Tensor, int, Tensor | None], output: Tensor) -> None:
    x, block, lengths = inputs
    ctx.save_for_backward(lengths)
    ctx.n, ctx.block = x.shape[2], block


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (lengths,) = ctx.saved_tensors
    n, block = ctx.n, ctx.block
    exists = _place_weights(n, block, lengths, grad.device)
    share = exists / exists.sum(-1, keepdim=True).clamp(min=1)
    spread = grad[:, :, :, None] * share[..., None].to(grad.dtype)
    return spread.flatten(2, 3)[:, :, :n], None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup)


def block_means(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """Means [B, H, ceil(N / block), D] over the tokens of x [B, H, N, D] that exist; 0 for none."""
    if block < 1:
        raise ValueError(f"block: must be positive, got {block}")
    means: Tensor = torch.ops.ditopt.block_means.default(x, block, lengths)
    return means


def log_lengths(n: int, block: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Logarithms float32 [1, 1, ceil(n / block)] of how many tokens each block has."""
    return _place_weights(n, block, lengths, device).sum(-1).float().log()[None, None]


def dropped_bits(counts: Tensor, ids: Tensor, key_blocks: int, partial: Partial | None) -> Tensor:
    """Bits int32 [Bl, Hl, QB, ceil(key_blocks / 32)] of the blocks that are on no list.

    A query block whose lists are empty sees every block through its mean.
    """
    keep = to_blocks(counts, ids, key_blocks)
    if partial is not None:
        keep = keep | to_blocks(partial.num_blocks, partial.indices, key_blocks)
    return pack_bits(~keep)


def _bits_of_lists(counts: Tensor, ids: Tensor) -> Tensor:
    """`dropped_bits` of lists of full width, as an operator for graphs; waits for nothing."""
    return dropped_bits(counts, ids, ids.shape[-1], None)


def _fake_bits(counts: Tensor, ids: Tensor) -> Tensor:
    return ids.new_empty(*ids.shape[:-1], (ids.shape[-1] + WORD - 1) // WORD)


for _device in ("cpu", "cuda"):
    torch.library.impl(_BITS, _device)(_bits_of_lists)
torch.library.register_fake(_BITS, _fake_bits)


def mean_substitute(
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    ids: Tensor,
    block_k: int,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
) -> Pooled:
    """What stands for the blocks that the lists drop: the means of k and v [B, H, N_k, D].

    The bits and biases depend on the lists alone and can be kept with them.
    """
    n_k = k.shape[2]
    return Pooled(
        block_means(k, block_k, block_lengths),
        block_means(v, block_k, block_lengths),
        log_lengths(n_k, block_k, block_lengths, k.device),
        dropped_bits(counts, ids, -(-n_k // block_k), partial),
    )
