"""Block-sparse attention forward in plain Triton (sm_80 and later): the portable kernel.

Shapes and lists as in `reference`. dtype: bfloat16 and float16 in and out (float32 runs with IEEE
dots, for tests); scores, softmax and accumulation are float32. One program owns one query block (or a
part of at most 128 rows of it) of one head and walks its list; q is kept in registers or shared memory,
K and V tiles are software-pipelined through the id loads. Head sizes that are no power of two are split
into two tiles (72 = 64 + 16, 96 = 64 + 32), so that nothing is multiplied with more than 15 zeros.

Only the last entry of a list can be ragged (ids ascend), so only that one runs mask code. Loads are
guarded by 0 <= token < N_k in every case: an id out of range reads nothing.

Cost: 4 D FLOPs per kept (query, key) pair; K and V are read once per list entry, mostly from L2
(512 D bytes per 128-token block and query block in 16-bit formats). Source: attention.md 5.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import empty_output


@triton.jit
def _load_rows(ptr, offs, stride, n, cols, d, GUARD_ROWS: tl.constexpr, GUARD_COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``offs`` of a [n, d] matrix; columns ``cols``; zeros outside."""
    ptrs = ptr + offs[:, None].to(tl.int64) * stride + cols[None, :]
    if GUARD_ROWS and GUARD_COLS:
        return tl.load(
            ptrs,
            mask=((offs >= 0) & (offs < n))[:, None] & (cols < d)[None, :],
            other=0.0,
        )
    if GUARD_ROWS:
        return tl.load(ptrs, mask=((offs >= 0) & (offs < n))[:, None], other=0.0)
    if GUARD_COLS:
        return tl.load(ptrs, mask=(cols < d)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    acc1, acc2, m, l, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, start, n_k, d,
    qk_scale,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax; scores live in log2 units."""
    offs_n = start + tl.arange(0, BLOCK_N)
    cols1 = tl.arange(0, D1)
    k1 = _load_rows(k_ptr, offs_n, stride_kn, n_k, cols1, d, True, False)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        k2 = _load_rows(k_ptr, offs_n, stride_kn, n_k, cols2, d, True, not EVEN_D)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    if MASK:
        s = tl.where(((offs_n >= 0) & (offs_n < n_k))[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    if MASK:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        shift = m_new
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v1 = _load_rows(v_ptr, offs_n, stride_vn, n_k, cols1, d, True, False)
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=PRECISION)
    if D2 > 0:
        v2 = _load_rows(v_ptr, offs_n, stride_vn, n_k, D1 + tl.arange(0, D2), d, True, not EVEN_D)
        acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision=PRECISION)
    return acc1, acc2, m_new, l


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, ids_ptr, order_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, n_q, n_k, d, width, qk_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, EVEN_D: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_bh = tl.program_id(1)
    if HAS_ORDER:
        pid_bh = tl.load(order_ptr + pid_bh)
    b = (pid_bh // heads).to(tl.int64)
    h = (pid_bh % heads).to(tl.int64)
    row = pid_m // (BLOCK_Q // BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    out_ptr += b * stride_ob + h * stride_oh
    ids_ptr += b * stride_ib + h * stride_ih + row.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
    count = tl.minimum(tl.maximum(count, 0), width)

    cols1 = tl.arange(0, D1)
    q1 = _load_rows(q_ptr, offs_m, stride_qm, n_q, cols1, d, True, False)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        q2 = _load_rows(q_ptr, offs_m, stride_qm, n_q, cols2, d, True, not EVEN_D)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    else:
        q2 = q1
        acc2 = acc1
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    TILES: tl.constexpr = BLOCK_K // BLOCK_N
    # The last tile of the list is peeled: the loop below has no mask code.
    total = count * TILES
    for j in range(0, total - TILES):
        start = tl.load(ids_ptr + j // TILES) * BLOCK_K + (j % TILES) * BLOCK_N
        acc1, acc2, m, l = _step(
            acc1, acc2, m, l, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, start, n_k, d, qk_scale,
            False, BLOCK_N, D1, D2, EVEN_D, PRECISION,
        )  # fmt: skip
    for j in range(tl.maximum(total - TILES, 0), total):
        start = tl.load(ids_ptr + j // TILES) * BLOCK_K + (j % TILES) * BLOCK_N
        acc1, acc2, m, l = _step(
            acc1, acc2, m, l, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, start, n_k, d, qk_scale,
            True, BLOCK_N, D1, D2, EVEN_D, PRECISION,
        )  # fmt: skip

    inverse = 1.0 / tl.where(l == 0.0, 1.0, l)
    out_rows = out_ptr + offs_m[:, None].to(tl.int64) * stride_om
    in_q = (offs_m < n_q)[:, None]
    tl.store(out_rows + cols1[None, :], (acc1 * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=in_q)
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        tl.store(
            out_rows + cols2[None, :],
            (acc2 * inverse[:, None]).to(out_ptr.dtype.element_ty),
            mask=in_q & (cols2 < d)[None, :],
        )
    if HAS_LSE:
        # m is in log2 units; the boundary speaks natural logarithms. log2(0) = -inf for empty rows.
        lse = tl.where(l == 0.0, float("-inf"), (m + tl.math.log2(l)) * 0.6931471805599453)
        tl.store(lse_ptr + pid_bh.to(tl.int64) * n_q + offs_m, lse, mask=offs_m < n_q)


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch: query rows, keys per step, warps, software-pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split_head_size(d: int) -> tuple[int, int]:
    """``d`` as two power-of-two tiles (second 0 where one fits): 64 -> (64, 0), 72 -> (64, 16)."""
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    if rest == 0:
        return d, 0
    return first, max(16, 1 << (rest - 1).bit_length())


def default_config(d: int, block_q: int, block_k: int, dtype: torch.dtype) -> Config:
    """Launch configuration for H200 (see configs.yaml for the measurements behind it)."""
    if dtype == torch.float32:
        return Config(min(block_q, 64), min(block_k, 32), 4, 2)
    block_m = min(block_q, 128)
    return Config(block_m, min(block_k, 128), 8 if block_m == 128 else 4, 2 if d > 64 else 3)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    *,
    return_lse: bool = False,
    order: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; ``order`` int32 [B*H] starts (batch, head) pairs in that order."""
    batch, heads, n_q, d = q.shape
    config = config or default_config(d, block_q, block_k, q.dtype)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = empty_output(q, v)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if return_lse else None
    counts = kv_num_blocks.expand(batch, heads, -1)
    ids = kv_indices.expand(batch, heads, -1, -1)
    first, second = split_head_size(d)
    grid = (triton.cdiv(n_q, config.block_m), batch * heads)
    _forward[grid](
        q, k, v, out, lse if lse is not None else out, counts, ids, order if order is not None else counts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        counts.stride(0), counts.stride(1), ids.stride(0), ids.stride(1), ids.stride(2),
        heads, n_q, k.shape[2], d, ids.shape[-1], scale * math.log2(math.e),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        D1=first, D2=second, EVEN_D=first + second == d, HAS_LSE=return_lse,
        HAS_ORDER=order is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """Attention output [B, H, N_q, D] in q's dtype; arguments as in `reference`."""
    return forward(q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale)[0]
