# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""Hierarchical top-k attention in plain Triton (sm_80 and later): no step waits for the host.

Four small kernels: `_pool` makes one level's means from the level below; `_select` scores 16 pooled
queries with one parent against its candidates and takes the best by repeated maxima; `_fine`
gathers the kept blocks of 16 queries into one tile of keys and attends to them at once; `_coarse`
continues that softmax over the pooled tokens, which 256 queries and more share, in tiles of 128
queries. Semantics and cost: `reference`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16
_TILE_Q, _TILE_K = 128, 64  # queries and pooled keys of one step of `_coarse`
# One warp for `_fine` was the fastest of 1, 2, 4 and 8 on an H200; the others spill no registers on
# sm_90 at D = 64 (ptxas).
_FINE_WARPS, _COARSE_WARPS, _COARSE_STAGES = 1, 8, 2


@triton.jit
def _pool(
    x_ptr, out_ptr, stride_b, stride_h, stride_n, stride_out, heads, n, count, parents, size,
    FAN: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Means of FAN rows of the level below, each weighted by its tokens."""
    pid_bh = tl.program_id(1)
    x_ptr += (pid_bh // heads).to(tl.int64) * stride_b + (pid_bh % heads).to(tl.int64) * stride_h
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    total = tl.zeros([ROWS, D], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    # Unrolled: all loads are in flight before the first is used, and no thread waits for another.
    for child in tl.static_range(FAN):
        offs = rows * FAN + child
        at = x_ptr + offs[:, None].to(tl.int64) * stride_n + cols[None, :]
        tokens = tl.minimum(tl.maximum(n - offs * size, 0), size).to(tl.float32)
        x = tl.load(at, mask=(offs < count)[:, None], other=0.0).to(tl.float32)
        total += x * tokens[:, None]
        weight += tokens
    mean = total / tl.maximum(weight, 1.0)[:, None]
    out = out_ptr + pid_bh.to(tl.int64) * stride_out + rows[:, None] * D + cols[None, :]
    tl.store(out, mean, mask=(rows < parents)[:, None])


def pool_levels(x: Tensor, depth: int) -> list[Tensor]:
    """Means float32 [B, H, ceil(N / 16 ** l), D] for l = 1 to ``depth``; x is read once.

    They lie one after another in memory: see `_joined`.
    """
    batch, heads, n, d = x.shape
    counts = [triton.cdiv(n, BLOCK**level) for level in range(1, depth + 1)]
    whole = x.new_empty(batch, heads, sum(counts), d, dtype=torch.float32)
    means = list(whole.split(counts, 2))
    below, size = x if x.stride(3) == 1 else x.contiguous(), 1
    for out in means:
        parents = out.shape[2]
        _pool[(triton.cdiv(parents, BLOCK), batch * heads)](
            below, out, *below.stride()[:3], whole.stride(1), heads, n, below.shape[2], parents,
            size, FAN=BLOCK, ROWS=BLOCK, D=d, num_warps=4,
        )  # fmt: skip
        below, size = out, size * BLOCK
    return means


def _joined(parts: list[Tensor]) -> Tensor:
    """The tensor [B, H, sum of rows, ...] whose consecutive parts these are."""
    first = parts[0]
    rows = sum(part.shape[2] for part in parts)
    return first.as_strided((*first.shape[:2], rows, first.shape[3]), first.stride())


@triton.jit
def _select(
    q_ptr, k_ptr, parents_ptr, ids_ptr, stride_x, stride_ids, count, scale,
    ALL: tl.constexpr, FAN: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The best TOP of the candidates of 16 pooled queries, as ascending ids."""
    parent = tl.program_id(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    rows = parent * FAN + tl.arange(0, FAN)
    cols = tl.arange(0, WIDTH)
    if ALL:
        keys = cols
    else:
        above = parents_ptr + pid_bh * stride_ids + parent * TOP
        keys = tl.load(above + cols // FAN) * FAN + cols % FAN
    chans = tl.arange(0, D)
    q_rows = q_ptr + pid_bh * stride_x + rows[:, None] * D + chans[None, :]
    k_rows = k_ptr + pid_bh * stride_x + keys[:, None] * D + chans[None, :]
    q = tl.load(q_rows, mask=(rows < count)[:, None], other=0.0)
    k = tl.load(k_rows, mask=(keys < count)[:, None], other=0.0)
    scores = tl.dot(q * scale, tl.trans(k), input_precision="tf32x3")
    # One number to take the maximum of: the score's bits in the order of integers, then the place
    # from the end, so that the first of equal scores wins. Keys that do not exist come last.
    bits = scores.to(tl.int32, bitcast=True)
    ranked = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ranked = tl.where((keys < count)[None, :], ranked, -2147483648)
    ranked = ranked.to(tl.int64) * WIDTH + (WIDTH - 1 - cols)[None, :]
    chosen = tl.zeros([FAN, WIDTH], tl.int32)
    for _ in tl.static_range(TOP):
        left = tl.where(chosen == 0, ranked, -9223372036854775808)
        chosen += (left == tl.max(left, 1)[:, None]).to(tl.int32)
    place = tl.cumsum(chosen, 1) - 1
    at = ids_ptr + pid_bh * stride_ids + rows[:, None] * TOP + place
    keys = tl.broadcast_to(keys[None, :], (FAN, WIDTH))
    tl.store(at, keys, mask=(chosen == 1) & (rows < count)[:, None])


def select(q: list[Tensor], k: list[Tensor], top_k: int, scale: float) -> list[Tensor]:
    """Ids int32 [B, H, n, top_k] that each level keeps, level 1 first, from its pooled means."""
    batch, heads, _, d = q[0].shape
    counts = [means.shape[2] for means in q]
    whole = q[0].new_empty(batch, heads, sum(counts), top_k, dtype=torch.int32)
    found = list(whole.split(counts, 2))
    for level in reversed(range(len(q))):
        count, coarsest = counts[level], level == len(q) - 1
        width = triton.next_power_of_2(max(count, BLOCK)) if coarsest else top_k * BLOCK
        _select[(triton.cdiv(count, BLOCK), batch * heads)](
            q[level], k[level], found[level if coarsest else level + 1], found[level],
            q[level].stride(1), whole.stride(1), count, scale,
            ALL=coarsest, FAN=BLOCK, TOP=top_k, WIDTH=width, D=d,
            num_warps=4 if width <= 128 else 8,
        )  # fmt: skip
    return found


@triton.jit
def _fine(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_ids, heads, n, qk_scale,
    FAN: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """16 queries over the TOP blocks of 16 keys that they kept, in one tile."""
    block = tl.program_id(0)
    pid_bh = tl.program_id(1)
    b, h = (pid_bh // heads).to(tl.int64), (pid_bh % heads).to(tl.int64)
    rows = block * FAN + tl.arange(0, FAN)
    cols = tl.arange(0, TOP * FAN)
    chans = tl.arange(0, D)
    in_q = (rows < n)[:, None]
    ids = tl.load(ids_ptr + pid_bh.to(tl.int64) * stride_ids + block * TOP + cols // FAN)
    keys = ids * FAN + cols % FAN
    in_k = (keys >= 0) & (keys < n)
    q_rows = q_ptr + b * stride_qb + h * stride_qh + rows[:, None].to(tl.int64) * stride_qm
    k_rows = k_ptr + b * stride_kb + h * stride_kh + keys[:, None].to(tl.int64) * stride_kn
    v_rows = v_ptr + b * stride_vb + h * stride_vh + keys[:, None].to(tl.int64) * stride_vn
    q = tl.load(q_rows + chans[None, :], mask=in_q, other=0.0)
    k = tl.load(k_rows + chans[None, :], mask=in_k[:, None], other=0.0)
    v = tl.load(v_rows + chans[None, :], mask=in_k[:, None], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32") * qk_scale
    s = tl.where(in_k[None, :], s, float("-inf"))
    m = tl.max(s, 1)
    p = tl.math.exp2(s - m[:, None])
    norm = tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee" if IEEE else "tf32") / norm[:, None]
    o_rows = out_ptr + b * stride_ob + h * stride_oh + rows[:, None].to(tl.int64) * stride_om
    tl.store(o_rows + chans[None, :], out.to(out_ptr.dtype.element_ty), mask=in_q)
    tl.store(lse_ptr + pid_bh.to(tl.int64) * n + rows, m + tl.math.log2(norm), mask=rows < n)


@triton.jit
def _coarse_step(
    acc, m, norm, q, k_ptr, v_ptr, keys, inside, n, size, qk_scale, D: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    """One tile of pooled keys, each with the weight of its tokens; scores live in log2 units."""
    chans = tl.arange(0, D)
    at = keys[:, None].to(tl.int64) * D + chans[None, :]
    k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
    tokens = tl.minimum(n - keys * size, size).to(tl.float32)
    bias = tl.where(inside, tl.math.log2(tl.maximum(tokens, 1.0)), float("-inf"))
    s = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32") * qk_scale
    s += bias[None, :]
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.math.exp2(s - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee" if IEEE else "tf32")
    return acc, m_new, norm


@triton.jit
def _coarse(
    q_ptr, out_ptr, lse_ptr, k_ptr, v_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om,
    heads, n, total, qk_scale,
    FAN: tl.constexpr, TOP: tl.constexpr, DEPTH: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, D: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Goes on from `_fine` over the pooled tokens of every level; writes over its output.

    ``k_ptr`` and ``v_ptr`` hold the levels one after another, ``total`` rows for each head, and
    ``ids_ptr`` what they keep.
    """
    tile = tl.program_id(0)
    pid_bh = tl.program_id(1)
    b, h = (pid_bh // heads).to(tl.int64), (pid_bh % heads).to(tl.int64)
    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    chans = tl.arange(0, D)
    in_q = (rows < n)[:, None]
    q_rows = q_ptr + b * stride_qb + h * stride_qh + rows[:, None].to(tl.int64) * stride_qm
    o_rows = out_ptr + b * stride_ob + h * stride_oh + rows[:, None].to(tl.int64) * stride_om
    q = tl.load(q_rows + chans[None, :], mask=in_q, other=0.0)
    acc = tl.load(o_rows + chans[None, :], mask=in_q, other=0.0).to(tl.float32)
    m = tl.load(lse_ptr + pid_bh.to(tl.int64) * n + rows, mask=rows < n, other=0.0)
    norm = tl.full([TILE_Q], 1.0, tl.float32)
    k_ptr += pid_bh.to(tl.int64) * total * D
    v_ptr += pid_bh.to(tl.int64) * total * D
    ids_ptr += pid_bh.to(tl.int64) * total * TOP
    count = (n + FAN - 1) // FAN
    size = FAN
    group = tile * TILE_Q // (FAN * FAN)
    for _ in tl.static_range(DEPTH - 1):
        # The queries share the ancestor `group` one level up, and so the candidates of this one.
        above = ids_ptr + (count + group) * TOP
        for start in tl.static_range(0, TOP * FAN, TILE_K):
            cols = start + tl.arange(0, TILE_K)
            keys = tl.load(above + cols // FAN) * FAN + cols % FAN
            acc, m, norm = _coarse_step(
                acc, m, norm, q, k_ptr, v_ptr, keys, keys < count, n, size, qk_scale, D, IEEE,
            )  # fmt: skip
        k_ptr += count * D
        v_ptr += count * D
        ids_ptr += count * TOP
        count = (count + FAN - 1) // FAN
        size = size * FAN
        group = group // FAN
    for start in range(0, count, TILE_K):
        keys = start + tl.arange(0, TILE_K)
        acc, m, norm = _coarse_step(
            acc, m, norm, q, k_ptr, v_ptr, keys, keys < count, n, size, qk_scale, D, IEEE,
        )  # fmt: skip
    out = acc / norm[:, None]
    tl.store(o_rows + chans[None, :], out.to(out_ptr.dtype.element_ty), mask=in_q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, top_k: int, depth: int, coarse: bool, scale: float
) -> Tensor:
    """`reference.attention` for blocks of 16; D a power of two."""
    batch, heads, n, d = q.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    pooled_k = pool_levels(k, depth)
    kept = select(pool_levels(q, depth), pooled_k, top_k, scale)
    out = q.new_empty(batch, n, heads, d).transpose(1, 2)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    qk_scale, ieee = scale * math.log2(math.e), q.dtype == torch.float32
    blocks = kept[0].shape[2]
    _fine[(blocks, batch * heads)](
        q, k, v, out, lse, kept[0],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        kept[0].stride(1), heads, n, qk_scale,
        FAN=BLOCK, TOP=top_k, D=d, IEEE=ieee, num_warps=_FINE_WARPS,
    )  # fmt: skip
    if coarse:
        keys, values = (_joined(x).to(q.dtype) for x in (pooled_k, pool_levels(v, depth)))
        ids = _joined(kept)
        _coarse[(triton.cdiv(n, _TILE_Q), batch * heads)](
            q, out, lse, keys, values, ids, *q.stride()[:3], *out.stride()[:3],
            heads, n, keys.shape[2], qk_scale,
            FAN=BLOCK, TOP=top_k, DEPTH=depth, TILE_Q=_TILE_Q, TILE_K=min(_TILE_K, top_k * BLOCK),
            D=d, IEEE=ieee, num_warps=_COARSE_WARPS, num_stages=_COARSE_STAGES,
        )  # fmt: skip
    return out
