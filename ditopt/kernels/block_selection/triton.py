# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""Block selection in plain Triton (sm_80 and later): pooling, exact mass, and the rules.

`pool` reads its input once and is bound by memory. `choose` gives each row to one program, which
finds the k-th largest score, or the score at which the kept mass is reached, by bisection over the
32 bits of a float: no sort, exact, and the same cost whatever the rule. `block_mass` is attention
without values: half its arithmetic. Semantics: `reference`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import fewest

_INT_MIN = tl.constexpr(-2147483648)
_INT_MAX = tl.constexpr(2147483647)


@triton.jit
def _pool(
    x_ptr, out_ptr, stride_b, stride_h, stride_n, stride_d, heads, n, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    pid_bh = tl.program_id(1)
    x_ptr += (pid_bh // heads).to(tl.int64) * stride_b + (pid_bh % heads).to(tl.int64) * stride_h
    cols = tl.arange(0, D_PAD)
    total = tl.zeros([D_PAD], tl.float32)
    for start in range(0, BLOCK, ROWS):
        offs = block * BLOCK + start + tl.arange(0, ROWS)
        in_block = start + tl.arange(0, ROWS) < BLOCK
        mask = (in_block & (offs < n))[:, None] & (cols < D)[None, :]
        rows = x_ptr + offs[:, None].to(tl.int64) * stride_n + cols[None, :] * stride_d
        total += tl.sum(tl.load(rows, mask=mask, other=0.0).to(tl.float32), 0)
    length = tl.minimum(BLOCK, n - block * BLOCK)
    at = (pid_bh.to(tl.int64) * blocks + block) * D
    tl.store(out_ptr + at + cols, total / length, mask=cols < D)


def pool(x: Tensor, block: int) -> Tensor:
    """Means float32 [B, H, ceil(N / block), D] of blocks of x [B, H, N, D]; x is read once."""
    batch, heads, n, d = x.shape
    blocks = triton.cdiv(n, block)
    out = x.new_empty(batch, heads, blocks, d, dtype=torch.float32)
    _pool[(blocks, batch * heads)](
        x, out, *x.stride(), heads, n, blocks,
        BLOCK=block, ROWS=min(64, triton.next_power_of_2(block)),
        D=d, D_PAD=triton.next_power_of_2(d), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _kth_largest(x, k):
    """The k-th largest of int32 ``x``: the largest t that at least k entries reach."""
    found = tl.where(tl.sum((x >= 0).to(tl.int32), 0) >= k, 0, _INT_MIN)
    for bit in range(31):
        higher = found + (1 << (30 - bit))
        found = tl.where(tl.sum((x >= higher).to(tl.int32), 0) >= k, higher, found)
    return found


@triton.jit
def _reach(x, mass, wanted):
    """The largest t so that the ``mass`` of entries ``x >= t`` reaches ``wanted``."""
    found = tl.where(tl.sum(tl.where(x >= 0, mass, 0.0), 0) >= wanted, 0, _INT_MIN)
    for bit in range(31):
        higher = found + (1 << (30 - bit))
        reached = tl.sum(tl.where(x >= higher, mass, 0.0), 0) >= wanted
        found = tl.where(reached, higher, found)
    return found


@triton.jit
def _choose(
    scores_ptr, forced_ptr, counts_ptr, ids_ptr, rows, key_blocks, last_log, least, amount,
    TOP_P: tl.constexpr, THRESHOLD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    inside = cols < key_blocks
    at = (pid_bh * rows + row) * key_blocks
    scores = tl.load(scores_ptr + at + cols, mask=inside, other=float("-inf"))
    forced = tl.load(forced_ptr + row * key_blocks + cols, mask=inside, other=0) != 0
    weighted = scores + tl.where(cols == key_blocks - 1, last_log, 0.0)
    # Floats in an order that integers have too; forced blocks first, columns outside last.
    bits = weighted.to(tl.int32, bitcast=True)
    ranked = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ranked = tl.where(forced, _INT_MAX, tl.maximum(ranked, _INT_MIN + 1))
    ranked = tl.where(inside, ranked, _INT_MIN)

    least = tl.maximum(least, tl.sum(forced.to(tl.int32), 0))
    kth = _kth_largest(ranked, least)
    missing = least - tl.sum((ranked > kth).to(tl.int32), 0)
    ties = (ranked == kth) & inside
    keep = (ranked > kth) | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= missing))
    if TOP_P:
        mass = tl.exp(weighted - tl.max(weighted, 0))
        keep = keep | (ranked >= _reach(ranked, mass, amount * tl.sum(mass, 0)))
    if THRESHOLD:
        mean = tl.sum(tl.where(inside, scores, 0.0), 0) / key_blocks
        apart = tl.where(inside, scores - mean, 0.0)
        spread = tl.sqrt(tl.sum(apart * apart, 0) / key_blocks)
        keep = keep | (scores > mean + amount * spread)
    keep = keep & inside

    count = tl.sum(keep.to(tl.int32), 0)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(ids_ptr + at + place, cols, mask=keep)
    tl.store(ids_ptr + at + cols, 0, mask=inside & (cols >= count))
    tl.store(counts_ptr + pid_bh * rows + row, count)


def choose(
    scores: Tensor, n_k: int, block_k: int, forced: Tensor, rule: str, amount: float, minimum: int
) -> tuple[Tensor, Tensor]:
    """`reference.choose` as (counts, ids); scores float32 [B, H, QB, KB]."""
    batch, heads, rows, key_blocks = scores.shape
    counts = scores.new_empty(batch, heads, rows, dtype=torch.int32)
    ids = scores.new_empty(scores.shape, dtype=torch.int32)
    width = triton.next_power_of_2(key_blocks)
    _choose[(rows, batch * heads)](
        scores.contiguous(), forced.contiguous(), counts, ids, rows, key_blocks,
        math.log((n_k - (key_blocks - 1) * block_k) / block_k),
        fewest(key_blocks, rule, amount, minimum), amount,
        TOP_P=rule == "top_p", THRESHOLD=rule == "threshold", WIDTH=width,
        num_warps=max(1, min(8, width // 512)),
    )  # fmt: skip
    return counts, ids


@triton.jit
def _mass(
    q_ptr, k_ptr, lse_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    heads, n_q, n_k, rows, key_blocks, qk_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pid_bh = tl.program_id(1)
    b, h = (pid_bh // heads).to(tl.int64), (pid_bh % heads).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    lse_ptr += pid_bh.to(tl.int64) * n_q
    out_ptr += (pid_bh.to(tl.int64) * rows + row) * key_blocks
    cols = tl.arange(0, D_PAD)
    offs_m = row * BLOCK_Q + tl.arange(0, BLOCK_M)
    in_q = (offs_m < n_q) & (tl.arange(0, BLOCK_M) < BLOCK_Q)
    q = tl.load(
        q_ptr + offs_m[:, None].to(tl.int64) * stride_qm + cols[None, :],
        mask=in_q[:, None] & (cols < D)[None, :], other=0.0,
    )  # fmt: skip
    lse = tl.load(lse_ptr + offs_m, mask=in_q, other=float("inf")) * 1.4426950408889634
    for j in range(key_blocks):
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, BLOCK_K, BLOCK_N):
            offs_n = j * BLOCK_K + start + tl.arange(0, BLOCK_N)
            in_k = offs_n < n_k
            k = tl.load(
                k_ptr + offs_n[:, None].to(tl.int64) * stride_kn + cols[None, :],
                mask=in_k[:, None] & (cols < D)[None, :], other=0.0,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32")
            p = tl.math.exp2(s * qk_scale - lse[:, None])
            total += tl.sum(tl.where(in_k[None, :], p, 0.0), 1)
        tl.store(out_ptr + j, tl.sum(total, 0))


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, scale: float
) -> Tensor:
    """`reference.block_mass`, float32 [B, H, QB, KB]; 2 D FLOPs per pair of tokens."""
    batch, heads, n_q, d = q.shape
    n_k = k.shape[2]
    rows, key_blocks = triton.cdiv(n_q, block_q), triton.cdiv(n_k, block_k)
    out = q.new_empty(batch, heads, rows, key_blocks, dtype=torch.float32)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    wide = q.dtype != torch.float32
    _mass[(rows, batch * heads)](
        q, k, lse.float().contiguous(), out, *q.stride()[:3], *k.stride()[:3],
        heads, n_q, n_k, rows, key_blocks, scale * math.log2(math.e),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_M=max(16, triton.next_power_of_2(block_q)),
        BLOCK_N=min(block_k, 128 if wide else 32),
        D=d, D_PAD=max(16, triton.next_power_of_2(d)), IEEE=not wide,
        num_warps=8 if block_q >= 128 else 4, num_stages=3 if wide else 1,
    )  # fmt: skip
    return out
