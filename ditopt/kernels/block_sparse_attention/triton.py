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

Only the last entry of a list can be ragged (ids ascend), so only that one runs mask code, and loads
that are guarded by 0 <= token < N_k: an id out of range reads nothing. The entries before it are
whole blocks: their ids are clamped to the whole blocks of the tensor, so that rows need no guards
and addresses in a tile are computed once, outside the loop. Where an option hides keys, every load
is guarded.

Cost: 4 D FLOPs per kept (query, key) pair; K and V are read once per list entry, mostly from L2
(512 D bytes per 128-token block and query block in 16-bit formats). Source: attention.md 5.2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .configs import PlainConfig, plain_config
from .ops import empty_output
from .ops_lse import structured
from .triton_tiles import (
    accumulate,
    block_bits,
    eighths,
    entry_tokens,
    existing,
    inner,
    list_arguments,
    load_bias,
    load_tile,
    seen_bias,
    split_head_size,
    store_tile,
    strides,
    tile_from,
)
from .triton_tiles import aligned as aligned

if TYPE_CHECKING:
    from .lists import Partial, Pooled


@triton.jit
def _step(
    acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs, inside, bias, seen,
    qk_scale,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One key tile of the online softmax, in log2 units.

    Its tokens are ``offs`` [N] where ``inside``; under WHOLE those of ``offs`` + ``inside`` [N].
    ``bias`` [N] counts under BIAS, and may hide keys; ``seen``, [1, N] or [M, N], under MASK.
    """
    if WHOLE:
        k1, k2 = tile_from(k_ptr, offs, inside, stride_kn, D, D1, D2)
        s = inner(q1, q2, k1, k2, D2, IEEE)
        v1, v2 = tile_from(v_ptr, offs, inside, stride_vn, D, D1, D2)
    else:
        k1, k2 = load_tile(k_ptr, offs, inside, stride_kn, D, D1, D2)
        s = inner(q1, q2, k1, k2, D2, IEEE)
    if BIAS:
        s = s * qk_scale + bias[None, :]
        qk_scale = 1.0
    if MASK:
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    shift = m_new
    if BIAS or MASK:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s * qk_scale - shift[:, None])
    alpha = tl.math.exp2(m - shift)
    norm = norm * alpha + tl.sum(p, 1)
    if not WHOLE:
        v1, v2 = load_tile(v_ptr, offs, inside, stride_vn, D, D1, D2)
    acc1 = acc1 * alpha[:, None]
    if D2 > 0:
        acc2 = acc2 * alpha[:, None]
    acc1, acc2 = accumulate(acc1, acc2, p.to(v1.dtype), v1, v2, D2, IEEE)
    return acc1, acc2, m_new, norm


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, counts_ptr, ids_ptr,
    some_counts_ptr, some_ids_ptr, mask_ids_ptr, masks_ptr, lengths_ptr, bias_ptr,
    pooled_k_ptr, pooled_v_ptr, pooled_bias_ptr, bits_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_pkb, stride_pkh, stride_pkn,
    stride_pvb, stride_pvh, stride_pvn, stride_ob, stride_oh, stride_om,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    stride_scb, stride_sch, stride_sib, stride_sih, stride_siq,
    stride_bb, stride_bh, stride_pbb, stride_pbh, stride_wb, stride_wh, stride_wq,
    heads, n_q, n_k, n_pooled, width, some_width, masks, qk_scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_LSE: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POOLED: tl.constexpr, POOLED_WHOLE: tl.constexpr,
    MASKED_STAGES: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_bh = tl.program_id(1)
    # Inductor passes Python's floats as float64. A scale of 0 would make -inf * 0 of masked scores.
    qk_scale = tl.maximum(tl.full([], qk_scale, tl.float32), 1e-30)
    b = (pid_bh // heads).to(tl.int64)
    h = (pid_bh % heads).to(tl.int64)
    row = pid_m // (BLOCK_Q // BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = offs_m < n_q
    # NOTE: strides of q, k, v and pooled tokens come in units of 8 elements, so that the compiler
    # knows that rows start at multiples of 16 bytes. Where it did not, D = 72 mixed pipelined with
    # plain loads in one loop, and the program (triton 3.6.0) ended in an illegal memory access.
    q_ptr += b * (stride_qb * 8) + h * (stride_qh * 8)
    k_ptr += b * (stride_kb * 8) + h * (stride_kh * 8)
    v_ptr += b * (stride_vb * 8) + h * (stride_vh * 8)
    stride_kn = stride_kn * 8
    stride_vn = stride_vn * 8
    out_ptr += b * stride_ob + h * stride_oh
    ids_ptr += b * stride_ib + h * stride_ih + row.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
    count = tl.minimum(tl.maximum(count, 0), width)
    if HAS_BIAS:
        bias_ptr += b * stride_bb + h * stride_bh

    q1, q2 = load_tile(q_ptr, offs_m, in_q, stride_qm * 8, D, D1, D2)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    # Ids ascend, so only the last entry can be ragged: it is peeled, and the loop has no mask code.
    # Loops with masks have shallower rings: the same depth is more memory there (triton 3.6.0).
    total = tl.cdiv(count * BLOCK_K, BLOCK_N)
    plain = tl.maximum(total - (BLOCK_K + BLOCK_N - 1) // BLOCK_N, 0)
    if EVEN:
        plain = total
    if HAS_LENGTHS or HAS_BIAS:
        plain = 0
    for j in range(plain):
        if WHOLE:
            PARTS: tl.constexpr = BLOCK_K // BLOCK_N
            block = tl.load(ids_ptr + j // PARTS)
            block = tl.minimum(tl.maximum(block, 0), n_k // BLOCK_K - 1)
            offs = block * BLOCK_K + (j % PARTS) * BLOCK_N
            inside = tl.arange(0, BLOCK_N)
        else:
            block, place = entry_tokens(ids_ptr, j, count, BLOCK_K, BLOCK_N)
            offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, False)
        acc1, acc2, m, norm = _step(
            acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs, inside,
            inside, inside, qk_scale, WHOLE, False, False, D, D1, D2, IEEE,
        )  # fmt: skip
    for j in tl.range(plain, total, num_stages=MASKED_STAGES):
        block, place = entry_tokens(ids_ptr, j, count, BLOCK_K, BLOCK_N)
        offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, HAS_LENGTHS)
        bias = load_bias(bias_ptr, offs, inside, HAS_BIAS)
        acc1, acc2, m, norm = _step(
            acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs, inside,
            bias, inside[None, :], qk_scale, False, HAS_BIAS, True, D, D1, D2, IEEE,
        )  # fmt: skip
    if HAS_PARTIAL:
        some_ids_ptr += b * stride_sib + h * stride_sih + row.to(tl.int64) * stride_siq
        mask_ids_ptr += b * stride_sib + h * stride_sih + row.to(tl.int64) * stride_siq
        some = tl.load(some_counts_ptr + b * stride_scb + h * stride_sch + row)
        some = tl.minimum(tl.maximum(some, 0), some_width)
        in_block = (pid_m % (BLOCK_Q // BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)
        for j in tl.range(tl.cdiv(some * BLOCK_K, BLOCK_N), num_stages=MASKED_STAGES):
            block, place = entry_tokens(some_ids_ptr, j, some, BLOCK_K, BLOCK_N)
            offs, inside = existing(block, place, lengths_ptr, n_k, BLOCK_K, HAS_LENGTHS)
            mask_id, _ = entry_tokens(mask_ids_ptr, j, some, BLOCK_K, BLOCK_N)
            seen = block_bits(
                masks_ptr, mask_id, masks, in_block, place, inside,
                BLOCK_Q, BLOCK_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            bias = load_bias(bias_ptr, offs, inside, HAS_BIAS)
            acc1, acc2, m, norm = _step(
                acc1, acc2, m, norm, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, offs, inside,
                bias, seen & inside[None, :], qk_scale, False, HAS_BIAS, True, D, D1, D2, IEEE,
            )  # fmt: skip
    if HAS_POOLED:
        pooled_k_ptr += b * (stride_pkb * 8) + h * (stride_pkh * 8)
        pooled_v_ptr += b * (stride_pvb * 8) + h * (stride_pvh * 8)
        pooled_bias_ptr += b * stride_pbb + h * stride_pbh
        bits_ptr += b * stride_wb + h * stride_wh + row.to(tl.int64) * stride_wq
        # NOTE: at 128 keys a step two stages would make ptxas serialise the products of the loop
        # before as well (triton 3.6.0: WARPGROUP instructions beside every HGMMA in its SASS).
        for j in tl.range(tl.cdiv(n_pooled, BLOCK_N), num_stages=2 if BLOCK_N < 128 else 1):
            bias = seen_bias(pooled_bias_ptr, bits_ptr, j * BLOCK_N, n_pooled, BLOCK_N)
            if POOLED_WHOLE:
                offs = j * BLOCK_N
                inside = tl.arange(0, BLOCK_N)
            else:
                offs = j * BLOCK_N + tl.arange(0, BLOCK_N)
                inside = offs < n_pooled
            acc1, acc2, m, norm = _step(
                acc1, acc2, m, norm, q1, q2, pooled_k_ptr, pooled_v_ptr, stride_pkn * 8,
                stride_pvn * 8, offs, inside, bias, inside, qk_scale, POOLED_WHOLE, True, False,
                D, D1, D2, IEEE,
            )  # fmt: skip

    inverse = (1.0 / tl.where(norm == 0.0, 1.0, norm))[:, None]
    acc1 = acc1 * inverse
    if D2 > 0:
        acc2 = acc2 * inverse
    store_tile(out_ptr, offs_m, in_q, stride_om, acc1, acc2, D, D1, D2)
    if HAS_LSE:
        # m is in log2 units; the boundary speaks natural logarithms. log2(0) = -inf for empty rows.
        lse = tl.where(norm == 0.0, float("-inf"), (m + tl.math.log2(norm)) * 0.6931471805599453)
        tl.store(lse_ptr + pid_bh.to(tl.int64) * n_q + offs_m, lse, mask=in_q)


def default_config(q: Tensor, block_q: int, block_k: int, plainly: bool) -> PlainConfig:
    """The tuned configuration; float32 serves tests and only has to fit."""
    if q.dtype == torch.float32:
        return PlainConfig(min(block_q, 64), 32, 4, 2)
    name = torch.cuda.get_device_name(q.device)
    config = plain_config(name, block_q, block_k, int(q.shape[-1]))
    if block_k < 64:  # several entries fill a tile
        block_n, num_stages = 32 if block_q == 16 else 64, min(3, config.num_stages)
        config = replace(config, block_n=block_n, num_stages=num_stages)
    if block_q < 64:
        return replace(config, num_warps=block_q // 16)
    # Options take registers; of 8 warps only one program would fit a multiprocessor.
    return config if plainly or config.block_n > 64 else replace(config, num_warps=4)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled: Pooled | None = None,
    *,
    return_lse: bool = False,
    config: PlainConfig | None = None,
    launcher: Any = _forward,
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel; arguments as in `reference`, LSE None unless asked for."""
    batch, heads, n_q, _ = q.shape
    # These choose the program: under symbolic shapes they become constants.
    d, block_q, block_k = int(q.shape[-1]), int(block_q), int(block_k)
    plainly = all(option is None for option in (partial, block_lengths, key_bias, pooled))
    config = config or default_config(q, block_q, block_k, plainly)
    q, k, v = (aligned(x) for x in (q, k, v))
    out = empty_output(q, v)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if return_lse else None
    lists = (kv_num_blocks, kv_indices, partial, block_lengths, key_bias, pooled)
    first, second = split_head_size(d)
    launcher[(triton.cdiv(n_q, config.block_m), batch * heads)](
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse,
        **eighths("q", q), **eighths("k", k), **eighths("v", v),
        **strides("o", out, "bhm"), **list_arguments(batch, heads, *lists),
        heads=heads, n_q=n_q, n_k=k.shape[2], qk_scale=scale * math.log2(math.e),
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        D=d, D1=first, D2=second, HAS_LSE=return_lse,
        EVEN=config.block_n <= block_k and k.shape[2] % block_k == 0,
        WHOLE=bool(
            config.block_n <= block_k <= k.shape[2] and max(k.stride(2), v.stride(2)) < 1 << 24
        ),
        HAS_PARTIAL=partial is not None, HAS_LENGTHS=block_lengths is not None,
        HAS_BIAS=key_bias is not None, HAS_POOLED=pooled is not None,
        POOLED_WHOLE=pooled is not None
        and bool(
            pooled.k.shape[2] % config.block_n == 0
            and max(pooled.k.stride(2), pooled.v.stride(2)) < 1 << 24
        ),
        MASKED_STAGES=min(3, config.num_stages), IEEE=q.dtype == torch.float32,
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


@torch.library.triton_op("ditopt::block_sparse_attention_with_lse_triton", mutates_args={})
def plain_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    partial_num_blocks: Tensor | None = None,
    partial_indices: Tensor | None = None,
    partial_mask_ids: Tensor | None = None,
    masks: Tensor | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    pooled_bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for every option of `ops_lse`; forward only."""
    partial = (partial_num_blocks, partial_indices, partial_mask_ids, masks)
    pooled = (pooled_k, pooled_v, pooled_bias, pooled_bits)
    options = structured((*partial, block_lengths, key_bias, *pooled))
    lists = (kv_num_blocks, kv_indices, block_q, block_k, scale)
    launcher = wrap_triton(_forward)
    out, lse = forward(q, k, v, *lists, *options, return_lse=True, launcher=launcher)
    assert lse is not None
    return out, lse
