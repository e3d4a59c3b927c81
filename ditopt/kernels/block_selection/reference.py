"""Block selection in plain PyTorch: the specification of the selector operators.

A selector scores every (query block, key block) pair, then a *rule* keeps some blocks of each row.
Scores live in natural-log units: exp of the score is proportional to the softmax mass of one key of
the block. ``forced`` bool [QB, KB] is always kept: text, the diagonal, a static pattern.

Order of a row: forced blocks, then by score plus log(tokens of the block), descending, then by id.
- ``top_k``: the first ``ceil(amount * KB)`` blocks; at least ``minimum`` and all forced ones.
- ``top_p``: forced blocks, then the fewest others so that the kept mass reaches ``amount``; equal
  blocks are kept together; at least ``minimum``.
- ``threshold``: forced blocks and those that score more than ``amount`` standard deviations above
  the row's mean; at least ``minimum``.

Pooled scores are ``scale * mean(q) . mean(k)`` over the tokens of the blocks, in float32 (float64
for float64). Subtracting the mean key from all keys first (K smoothing) shifts a row's scores by a
constant and so changes no rule; it is done because it keeps small differences of large numbers.

Nothing here waits for the device. Sources: attention.md A4 and 5.5 (VSA, SLA, SpargeAttn,
DraftAttention; Sol-Attn for the threshold; NABLA for forced static blocks).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import from_blocks

RULES = ("top_k", "top_p", "threshold")


def block_lengths(n: int, block: int, device: torch.device) -> Tensor:
    """Tokens of each of the ceil(n / block) blocks, int64."""
    return (n - torch.arange(0, n, block, device=device)).clamp(max=block)


def pool(x: Tensor, block: int) -> Tensor:
    """Means [B, H, ceil(N / block), D] of blocks of x [B, H, N, D], float32 or float64."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.shape[2]
    blocks = torch.nn.functional.pad(x.to(accumulate), (0, 0, 0, -n % block))
    total = blocks.reshape(*x.shape[:2], -1, block, x.shape[3]).sum(3)
    return total / block_lengths(n, block, x.device)[:, None]


def score_means(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """Scores [B, H, QB, KB] of pooled queries and keys; the mean key is taken out."""
    k_means = k_means - k_means.mean(2, keepdim=True)
    return (q_means * scale) @ k_means.transpose(-1, -2)


def fewest(key_blocks: int, rule: str, amount: float, minimum: int) -> int:
    """How many blocks a row keeps at least, by its rule and `minimum`."""
    wanted = max(minimum, math.ceil(amount * key_blocks)) if rule == "top_k" else minimum
    return min(key_blocks, wanted)


def choose(
    scores: Tensor, lengths: Tensor, forced: Tensor, rule: str, amount: float, minimum: int
) -> Tensor:
    """The kept blocks, bool like `scores` [B, H, QB, KB]; `lengths` [KB] of the key blocks."""
    weighted = scores + lengths.to(scores.dtype).log()
    ranked = torch.where(forced, math.inf, weighted)
    values, order = ranked.sort(dim=-1, descending=True, stable=True)
    least = fewest(scores.shape[-1], rule, amount, minimum)
    first = torch.arange(scores.shape[-1], device=scores.device) < least
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep = keep.scatter(-1, order, first.expand_as(order)) | forced
    if rule == "threshold":
        spread = scores.std(-1, correction=0, keepdim=True)
        return keep | (scores > scores.mean(-1, keepdim=True) + amount * spread)
    if rule == "top_p":
        mass = torch.softmax(weighted, -1).gather(-1, order).cumsum(-1)
        # The first block that reaches the mass decides; rounding may keep all from reaching 1.
        last = (mass < amount).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return keep | (ranked >= values.gather(-1, last))
    return keep


def select_pooled(
    q: Tensor,
    k: Tensor,
    forced: Tensor,
    block_q: int,
    block_k: int,
    rule: str,
    amount: float,
    minimum: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Lists from pooled scores: counts int32 [B, H, QB] and ids int32 [B, H, QB, KB], ascending.

    q [B, H, N_q, D], k [B, H, N_k, D]; blocks of `block_q` and `block_k` tokens, the last of each
    may be shorter; `forced` bool [QB, KB]; entries past the count are 0.
    """
    scores = score_means(pool(q, block_q), pool(k, block_k), scale)
    lengths = block_lengths(k.shape[2], block_k, k.device)
    return from_blocks(choose(scores, lengths, forced, rule, amount, minimum))


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float
) -> Tensor:
    """Softmax mass of each block, [B, H, QB, KB]: sums of ``exp(scale * q.k - lse)``.

    ``lse`` [B, H, N_q], natural logarithm, of the same or an earlier call (AdaSpa, 2502.21079: it
    hardly moves between steps). With the call's own a row sums to its number of queries.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(accumulate) @ k.to(accumulate).transpose(-1, -2)) * scale
    mass = torch.exp(scores - lse[..., None])
    mass = torch.nn.functional.pad(mass, (0, -k.shape[2] % block_k, 0, -q.shape[2] % block_q))
    rows, columns = mass.shape[2] // block_q, mass.shape[3] // block_k
    return mass.reshape(*mass.shape[:2], rows, block_q, columns, block_k).sum((3, 5))


def select_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    forced: Tensor,
    block_q: int,
    block_k: int,
    rule: str,
    amount: float,
    minimum: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Lists from the exact mass of every block; otherwise as `select_pooled`."""
    scores, lengths = score_mass(
        block_mass(q, k, lse, block_q, block_k, scale), k.shape[2], block_k
    )
    return from_blocks(choose(scores, lengths, forced, rule, amount, minimum))


def score_mass(mass: Tensor, n_k: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Scores [B, H, QB, KB] of a mass (log of the mass per key), and the blocks' lengths [KB]."""
    lengths = block_lengths(n_k, block_k, mass.device)
    # A mass that underflowed still has a place in the mean and the spread of its row.
    return (mass / lengths).clamp(min=torch.finfo(torch.float32).tiny).log(), lengths
