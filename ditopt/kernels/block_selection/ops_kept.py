"""``ditopt::select_blocks``: any scores, any rule, and lists that serve several computed steps.

`ops` has the operators of one score and a rule by rows, which need no state. This one adds the
rules of `whole_heads`, finds the log-sum-exp that exact mass needs by itself, and keeps lists over
`refresh` computed steps in what the step runtime made active (`reuse`). ``slot`` int64 [] lies on
the CPU and tells sites apart. The lists that it returns are the caller's own.

Cost where it chooses: pooled scores read q and k once; exact mass is a dense attention for the
log-sum-exp and half of one for the mass, on a CPU (`cpu`) about one in all. Where it does not: a
copy of the lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import ops_lse
from ditopt.kernels.block_sparse_attention.lists import from_blocks

from . import cpu, ops, reference, whole_heads
from .reuse import Lists, active

_NAME = "ditopt::select_blocks"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor forced, Tensor slot, str scores, int block_q, int block_k, "
    "str rule, float amount, int minimum, float scale, int refresh) -> (Tensor, Tensor)",
)


def _select(
    q: Tensor, k: Tensor, forced: Tensor, slot: Tensor, scores: str, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float, refresh: int,
) -> Lists:  # fmt: skip
    def choose() -> Lists:
        settings = (block_q, block_k, rule, amount, minimum, scale)
        if scores == "mass":
            return _by_mass(q, k, forced, *settings)
        if rule in reference.RULES:
            lists: Lists = torch.ops.ditopt.select_blocks_pooled.default(q, k, forced, *settings)
            return lists
        means = (ops.pooled(q, block_q), ops.pooled(k, block_k))
        lengths = reference.block_lengths(k.shape[2], block_k, k.device)
        found = reference.score_means(*means, scale)
        return from_blocks(whole_heads.choose(found, lengths, forced, rule, amount, minimum))

    kept = active()
    if kept is None or refresh == 1:
        return choose()
    counts, ids = kept.lists((int(slot), q.shape, k.shape), refresh, choose)
    return counts.clone(), ids.clone()  # a compiled program may reuse the memory of its values


def _by_mass(
    q: Tensor, k: Tensor, forced: Tensor, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float,
) -> Lists:  # fmt: skip
    if not q.is_cuda:
        mass = cpu.softmax_mass(q, k, block_q, block_k, scale)
    else:
        lse = dense_lse(q, k, block_q, block_k, scale)
        if rule in reference.RULES:
            settings = (block_q, block_k, rule, amount, minimum, scale)
            lists: Lists = torch.ops.ditopt.select_blocks_mass.default(q, k, lse, forced, *settings)
            return lists
        mass = torch.ops.ditopt.block_mass.default(q, k, lse, block_q, block_k, scale)
    scored, lengths = reference.score_mass(mass, k.shape[2], block_k)
    return from_blocks(whole_heads.choose(scored, lengths, forced, rule, amount, minimum))


def dense_lse(q: Tensor, k: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    """Natural log-sum-exp [B, H, N_q] of all scores, by the kernel with lists of every block."""
    rows, blocks = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    ids = torch.arange(blocks, device=q.device, dtype=torch.int32).expand(1, 1, rows, blocks)
    counts = torch.full((1, 1, rows), blocks, device=q.device, dtype=torch.int32)
    return ops_lse.call(q, k, k, counts, ids.contiguous(), block_q, block_k, scale)[1]


def _fake(
    q: Tensor, k: Tensor, forced: Tensor, slot: Tensor, scores: str, block_q: int, block_k: int,
    rule: str, amount: float, minimum: int, scale: float, refresh: int,
) -> Lists:  # fmt: skip
    return ops.fake_lists(q, k, block_q, block_k)


for _device in ("cpu", "cuda"):
    torch.library.impl(_NAME, _device)(_select)
torch.library.register_fake(_NAME, _fake)
