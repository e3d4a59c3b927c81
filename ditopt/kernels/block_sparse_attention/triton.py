# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
"""Block-sparse attention forward in plain Triton (sm_80 and later): the portable kernel.

Shapes and lists as in `reference`. dtype: bfloat16 and float16 in and out (float32 runs with IEEE
dots, for tests); scores, softmax and accumulation are float32. One program owns one query block (or
a part of at most 128 rows of it) of one head and walks its list; q is kept in registers or shared
memory, K and V tiles are software-pipelined through the id loads. Head sizes that are no power of
two are split into two tiles (72 = 64 + 16, 96 = 64 + 32), so that nothing is multiplied with more
than 15 zeros.

Only the last entry of a list can be ragged (ids ascend), so only that one runs mask code. Loads are
guarded by 0 <= token < N_k in every case: an id out of range reads nothing.

Cost: 4 D FLOPs per kept (query, key) pair; K and V are read once per list entry, mostly from L2
(512 D bytes per 128-token block and query block in 16-bit formats). Source: attention.md 5.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .configs import PlainConfig, plain_config
from .ops import empty_output


@triton.jit
def _load_rows(ptr, offs, stride, n, cols, D: tl.constexpr, GUARD_COLS: tl.constexpr):
    """Rows ``offs`` of a [n, D] matrix; columns ``cols``; zeros outside."""
    mask = ((offs >= 0) & (offs < n))[:, None]
    if GUARD_COLS:
        mask = mask & (cols < D)[None, :]
    return tl.load(ptr + offs[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _step(
    acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, start, n_k, qk_scale,
    MASK: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax; scores live in log2 units."""
    offs_n = start + tl.arange(0, BLOCK_N)
    cols1 = tl.arange(0, D1)
    k1 = _load_rows(k_ptr, offs_n, stride_kn, n_k, cols1, D, False)
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee" if IEEE else "tf32")
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        k2 = _load_rows(k_ptr, offs_n, stride_kn, n_k, cols2, D, D1 + D2 > D)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee" if IEEE else "tf32")
    if MASK:
        s = tl.where(((offs_n >= 0) & (offs_n < n_k))[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    norm = norm * alpha + tl.sum(p, 1)
    v1 = _load_rows(v_ptr, offs_n, stride_vn, n_k, cols1, D, False)
    p = p.to(v1.dtype)
    acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee" if IEEE else "tf32")
    if D2 > 0:
        v2 = _load_rows(v_ptr, offs_n, stride_vn, n_k, D1 + tl.arange(0, D2), D, D1 + D2 > D)
        acc2 = tl.dot(p, v2, acc2 * alpha[:, None], input_precision="ieee" if IEEE else "tf32")
    return acc1, acc2, m_new, norm


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, ids_ptr, order_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, n_q, n_k, width, qk_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_ORDER: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_bh = tl.program_id(1)
    qk_scale = tl.full([], qk_scale, tl.float32)  # Inductor passes Python's floats as float64
    if HAS_ORDER:
        pid_bh = tl.load(order_ptr + pid_bh)
    b = (pid_bh // heads).to(tl.int64)
    h = (pid_bh % heads).to(tl.int64)
    row = pid_m // (BLOCK_Q // BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # NOTE: strides of q, k and v come in units of 8 elements, so that the compiler knows that rows
    # start at multiples of 16 bytes. Where it did not, D = 72 mixed pipelined with plain loads in
    # one loop, and the program (triton 3.6.0) ended in an illegal memory access.
    q_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    k_ptr += b * (stride_kb * 8) + h * (stride_kh * 8)
    v_ptr += b * (stride_vb * 8) + h * (stride_vh * 8)
    stride_qm = stride_qm * 8
    stride_kn = stride_kn * 8
    stride_vn = stride_vn * 8
    out_ptr += b * stride_ob + h * stride_oh
    ids_ptr += b * stride_ib + h * stride_ih + row.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
    count = tl.minimum(tl.maximum(count, 0), width)

    cols1 = tl.arange(0, D1)
    q1 = _load_rows(q_ptr, offs_m, stride_qm, n_q, cols1, D, False)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        q2 = _load_rows(q_ptr, offs_m, stride_qm, n_q, cols2, D, D1 + D2 > D)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    else:
        q2 = q1
        acc2 = acc1
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    TILES: tl.constexpr = BLOCK_K // BLOCK_N
    # The last tile of the list is peeled: the loop below has no mask code.
    total = count * TILES
    for j in range(total - TILES):
        start = tl.load(ids_ptr + j // TILES) * BLOCK_K + (j % TILES) * BLOCK_N
        acc1, acc2, m, norm = _step(
            acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, start, n_k, qk_scale,
            False, BLOCK_N, D, D1, D2, IEEE,
        )  # fmt: skip
    for j in range(tl.maximum(total - TILES, 0), total):
        start = tl.load(ids_ptr + j // TILES) * BLOCK_K + (j % TILES) * BLOCK_N
        acc1, acc2, m, norm = _step(
            acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, start, n_k, qk_scale,
            True, BLOCK_N, D, D1, D2, IEEE,
        )  # fmt: skip

    inverse = 1.0 / tl.where(norm == 0.0, 1.0, norm)
    out_rows = out_ptr + offs_m[:, None].to(tl.int64) * stride_om
    in_q = (offs_m < n_q)[:, None]
    out1 = (acc1 * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows + cols1[None, :], out1, mask=in_q)
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        tl.store(
            out_rows + cols2[None, :],
            (acc2 * inverse[:, None]).to(out_ptr.dtype.element_ty),
            mask=in_q & (cols2 < D)[None, :],
        )
    if HAS_LSE:
        # m is in log2 units; the boundary speaks natural logarithms. log2(0) = -inf for empty rows.
        lse = tl.where(norm == 0.0, float("-inf"), (m + tl.math.log2(norm)) * 0.6931471805599453)
        tl.store(lse_ptr + pid_bh.to(tl.int64) * n_q + offs_m, lse, mask=offs_m < n_q)


@triton.jit
def _order_heads(
    counts_ptr, order_ptr, counter_ptr, stride_b, stride_h, heads, pairs, rows,
    PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(batch, head) pairs by total list length, longest first; also clears the tile counter."""
    offs = tl.arange(0, PAIRS)
    base = counts_ptr + (offs // heads).to(tl.int64) * stride_b + (offs % heads) * stride_h
    total = tl.zeros([PAIRS], tl.int32)
    for start in range(0, rows, ROWS):
        cols = start + tl.arange(0, ROWS)
        inside = (offs < pairs)[:, None] & (cols < rows)[None, :]
        total += tl.sum(tl.load(base[:, None] + cols[None, :], mask=inside, other=0), 1)
    total = tl.where(offs < pairs, total, -1)
    before = (total[None, :] > total[:, None]) | (
        (total[None, :] == total[:, None]) & (offs[None, :] < offs[:, None])
    )
    rank = tl.sum(before.to(tl.int32), 1)
    tl.store(order_ptr + rank, offs, mask=offs < pairs)
    tl.store(counter_ptr, 0)


def order_heads(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(order int32 [B * H], zeroed counter int32 [1]) of counts [B, H, QB]; one small launch."""
    batch, heads, rows = counts.shape
    pairs = batch * heads
    scratch = torch.empty(pairs + 1, dtype=torch.int32, device=counts.device)
    _order_heads[(1,)](
        counts, scratch[1:], scratch, counts.stride(0), counts.stride(1), heads, pairs, rows,
        PAIRS=triton.next_power_of_2(pairs), ROWS=128, num_warps=8,
    )  # fmt: skip
    return scratch[1:], scratch[:1]


def split_head_size(d: int) -> tuple[int, int]:
    """``d`` as two power-of-two tiles (second 0 where one fits): 64 -> (64, 0), 72 -> (64, 16)."""
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    if rest == 0:
        return d, 0
    return first, max(16, 1 << (rest - 1).bit_length())


def default_config(q: Tensor, block_q: int, block_k: int) -> PlainConfig:
    """The tuned configuration; float32 serves tests and only has to fit."""
    if q.dtype == torch.float32:
        return PlainConfig(min(block_q, 64), min(block_k, 32), 4, 2)
    return plain_config(torch.cuda.get_device_name(q.device), block_q, block_k, int(q.shape[-1]))


def aligned(x: Tensor) -> Tensor:
    """``x`` [B, H, N, D] itself where rows start at multiples of 8 elements, else a copy."""
    # Memory blocks are aligned: the offset says what the address would, and can be traced.
    starts = (x.storage_offset(), *x.stride()[:3])
    fits = x.stride(3) == 1 and all(start % 8 == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


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
    config: PlainConfig | None = None,
    launcher: Any = _forward,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; ``order`` int32 [B*H] starts (batch, head) pairs in that order."""
    batch, heads, n_q, _ = q.shape
    # These choose the program: under symbolic shapes they become constants.
    d, block_q, block_k = int(q.shape[-1]), int(block_q), int(block_k)
    config = config or default_config(q, block_q, block_k)
    q, k, v = (aligned(x) for x in (q, k, v))
    out = empty_output(q, v)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if return_lse else None
    counts = kv_num_blocks.expand(batch, heads, -1)
    ids = kv_indices.expand(batch, heads, -1, -1)
    first, second = split_head_size(d)
    grid = (triton.cdiv(n_q, config.block_m), batch * heads)
    launcher[grid](
        q, k, v, out, lse,
        counts, ids, order,
        *(s // 8 for x in (q, k, v) for s in x.stride()[:3]), *out.stride()[:3],
        counts.stride(0), counts.stride(1), ids.stride(0), ids.stride(1), ids.stride(2),
        heads, n_q, k.shape[2], ids.shape[-1], scale * math.log2(math.e),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        D=d, D1=first, D2=second, HAS_LSE=return_lse,
        HAS_ORDER=order is not None,
        IEEE=q.dtype == torch.float32,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


@torch.library.triton_op("ditopt::block_sparse_attention_triton", mutates_args={})
def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """The kernel as an operator that compilers see through: Inductor and AOTInductor embed it."""
    launcher = wrap_triton(_forward)
    lists = (kv_num_blocks, kv_indices)
    return forward(q, k, v, *lists, block_q, block_k, scale, launcher=launcher)[0]
