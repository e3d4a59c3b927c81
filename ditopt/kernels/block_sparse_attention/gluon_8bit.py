# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806, RET505, SIM108
"""Block-sparse attention forward with 8-bit matrix products, in Gluon for Hopper.

What it computes is `reference_8bit`; `hopper_8bit` quantises and launches. The structure is
`gluon`'s: persistent CTAs, a producer warp, two consumer warpgroups. Q and K are
int8 with a scale per query row and per key block. V is the model's 16-bit V, or e4m3 with a scale
per channel: then V comes transposed, [B, H, D, tokens], because 8-bit wgmma reads both operands
along the summed axis, and in the token order of `hopper_8bit.TOKEN_ORDER`, so that each thread's
scores are already the operand of the second product. Tensor cores add e4m3 products with 14-bit
mantissas (SageAttention 2, arXiv 2411.10958, section 3.3): every key block starts from zero and is
added to the output in float32.

Cost: 4 D FLOPs per kept (query, key) pair at twice bf16's rate (with e4m3 V; else the first half).
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_produce import _barriers, _locate, _ring


@gluon.jit
def _produce(
    descs, smem, tile_smem, bars, work,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, V_BYTES: gl.constexpr,
):  # fmt: skip
    note: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    nth = 0
    tile = gl.program_id(0)
    while tile < work[11]:
        following = gl.atomic_add(work[3], 1) + work[13]
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        q_slot = nth % Q_STAGES
        q_full = bars[0].index(q_slot)
        mbarrier.wait(bars[1].index(q_slot), ((nth // Q_STAGES) & 1) ^ 1)
        tile_smem.index(q_slot).store(gl.full([1], tile, gl.int32, note))
        mbarrier.expect(q_full, CONSUMERS * 64 * D)
        for part in gl.static_range(CONSUMERS):
            row = (block * CONSUMERS + part) * 64
            tma.async_copy_global_to_shared(
                descs[0], [b, h, row, 0], q_full, smem[0].index(q_slot * CONSUMERS + part)
            )
        nth += 1
        tile = following
        for j in range(count):
            start = gl.load(ids + (count - 1 - j)) * BLOCK_N
            slot = it % STAGES
            phase = ((it // STAGES) & 1) ^ 1
            mbarrier.wait(bars[3].index(slot), phase)
            mbarrier.expect(bars[2].index(slot), BLOCK_N * D)
            tma.async_copy_global_to_shared(
                descs[1], [b, h, start, 0], bars[2].index(slot), smem[1].index(slot)
            )
            mbarrier.wait(bars[5].index(slot), phase)
            mbarrier.expect(bars[4].index(slot), BLOCK_N * D * V_BYTES)
            if V_BYTES == 1:
                at = [b, h, 0, start]
            else:
                at = [b, h, start, 0]
            tma.async_copy_global_to_shared(descs[2], at, bars[4].index(slot), smem[2].index(slot))
            it += 1
    q_slot = nth % Q_STAGES
    mbarrier.wait(bars[1].index(q_slot), ((nth // Q_STAGES) & 1) ^ 1)
    tile_smem.index(q_slot).store(gl.full([1], work[11], gl.int32, note))
    mbarrier.arrive(bars[0].index(q_slot), count=1)


@gluon.jit
def _scores(q, smem, slot, zero, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Starts q k^T [64, BLOCK_N] in int32 of the K tile in ``slot``; not finished on return."""
    k = smem[1].index(slot).reshape([BLOCK_N, D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _values(p, smem, slot, o, BLOCK_N: gl.constexpr, D: gl.constexpr, V_BYTES: gl.constexpr):
    """Starts p v: from zero where V is 8-bit, else onto ``o``; not finished on return."""
    if V_BYTES == 1:
        v = smem[2].index(slot).reshape([D, BLOCK_N]).permute((1, 0))
        return warpgroup_mma(p, v, gl.zeros_like(o), use_acc=False, is_async=True)
    else:
        return warpgroup_mma(p, smem[2].index(slot).reshape([BLOCK_N, D]), o, is_async=True)


@gluon.jit
def _operand(p32, dtype: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Probabilities as the left operand of the second product.

    For 8 bits a thread must hold four neighbours, and holds two and two of a group of 16: V's
    tokens are in that order, so the registers only get other names.
    """
    if dtype.primitive_bitwidth == 8:
        p = p32.reshape([64, BLOCK_N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        p = gl.convert_layout(p.reshape([64, BLOCK_N]), layout, assert_trivial=True)
        # NOTE: a plain cast takes bytes apart and puts them together (triton 3.6.0).
        return gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
            "=r,r,r,r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return gl.convert_layout(p32.to(dtype), layout)


@gluon.jit
def _scale(k_scales, block_id, key_blocks):
    """A key block's scale; an id out of range reads another's."""
    return gl.load(k_scales + gl.minimum(gl.maximum(block_id, 0), key_blocks - 1))


@gluon.jit
def _softmax(x, row_scale, m, norm, OFFSET: gl.constexpr):
    """(probabilities, new maximum, new sum, factor of what was summed before), in log2 units."""
    m_new = gl.maximum(m, gl.max(x, 1) * row_scale)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(x * row_scale[:, None] - (m_new - OFFSET)[:, None])
    return p, m_new, norm * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _consume(
    descs, smem, tile_smem, bars, work, scales, lse_ptr, n_q, n_k, key_blocks,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, V_BYTES: gl.constexpr,
    HAS_LSE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    out_type: gl.constexpr = descs[3].dtype
    p_type: gl.constexpr = descs[2].dtype
    OFFSET: gl.constexpr = 8.0 if V_BYTES == 1 else 0.0  # e4m3 reaches from 2**-9 to 448
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 // V_BYTES])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4 // V_BYTES)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    note: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    it = 0
    nth = 0
    mbarrier.wait(q_full.index(0), 0)
    tile = gl.max(tile_smem.index(0).load(note), 0)
    while tile < work[11]:
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        bh = (b * work[9] + h).to(gl.int64)
        q_slot = nth % Q_STAGES
        q = smem[0].index(q_slot * CONSUMERS + PART).reshape([64, D])
        first_row = (block * CONSUMERS + PART) * 64
        offs_m = first_row + gl.arange(0, 64, rows)
        q_scale = gl.load(scales[0] + bh * n_q + offs_m, mask=offs_m < n_q, other=1.0)
        k_scales = scales[1] + bh * key_blocks
        o = gl.zeros([64, D], gl.float32, o_layout)
        m = gl.full([64], -1e30, gl.float32, rows)  # finite: a block without keys leaves it
        norm = gl.zeros([64], gl.float32, rows)
        zero = gl.zeros([64, BLOCK_N], gl.int32, s_layout)
        if count > 0:
            block_id = gl.load(ids + count - 1)
            scale = _scale(k_scales, block_id, key_blocks)
            block_id_next = gl.load(ids + gl.maximum(count - 2, 0))
            mbarrier.wait(k_full.index(it % STAGES), (it // STAGES) & 1)
            s = _scores(q, smem, it % STAGES, zero, BLOCK_N, D)
            s = warpgroup_mma_wait(0, (s,))
            mbarrier.arrive(k_empty.index(it % STAGES), count=1)
            offs = block_id * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            x = gl.where(((offs >= 0) & (offs < n_k))[None, :], s.to(gl.float32), float("-inf"))
            for j in range(1, count):
                slot = it % STAGES
                ahead = it + 1
                scale_next = _scale(k_scales, block_id_next, key_blocks)
                block_id_next = gl.load(ids + gl.maximum(count - 2 - j, 0))
                p32, m, norm, alpha = _softmax(x, q_scale * scale, m, norm, OFFSET)
                p = _operand(p32, p_type, BLOCK_N, p_layout)
                if V_BYTES == 2:
                    o = o * gl.convert_layout(alpha, o_rows)[:, None]
                mbarrier.wait(k_full.index(ahead % STAGES), (ahead // STAGES) & 1)
                s = _scores(q, smem, ahead % STAGES, zero, BLOCK_N, D)
                mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
                t = _values(p, smem, slot, o, BLOCK_N, D, V_BYTES)
                s, t = warpgroup_mma_wait(0, (s, t))
                mbarrier.arrive(k_empty.index(ahead % STAGES), count=1)
                mbarrier.arrive(v_empty.index(slot), count=1)
                if V_BYTES == 2:
                    o = t
                else:
                    o = o * gl.convert_layout(alpha, o_rows)[:, None] + t
                x = s.to(gl.float32)
                scale = scale_next
                it = ahead
            p32, m, norm, alpha = _softmax(x, q_scale * scale, m, norm, OFFSET)
            p = _operand(p32, p_type, BLOCK_N, p_layout)
            o = o * gl.convert_layout(alpha, o_rows)[:, None]
            mbarrier.wait(v_full.index(it % STAGES), (it // STAGES) & 1)
            t = _values(p, smem, it % STAGES, o, BLOCK_N, D, V_BYTES)
            t = warpgroup_mma_wait(0, (t,))
            mbarrier.arrive(v_empty.index(it % STAGES), count=1)
            if V_BYTES == 2:
                o = t
            else:
                o = o + t
            it += 1
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        inverse = 1.0 / gl.where(norm == 0.0, 1.0, norm)
        o = o * gl.convert_layout(inverse, o_rows)[:, None]
        if V_BYTES == 1:
            v_scale = gl.load(scales[2] + bh * D + gl.arange(0, D, gl.SliceLayout(0, o_layout)))
            o = o * v_scale[None, :]
        staged = smem[3].index(PART)
        tma.store_wait(0)
        staged.reshape([64, D]).store(o.to(out_type))
        fence_async_shared()
        tma.async_copy_shared_to_global(descs[3], [b, h, first_row, 0], staged)
        if HAS_LSE:
            # m is in log2 units, the result in natural ones. Empty rows: log2(0) = -inf.
            lse = (m - OFFSET + gl.log2(norm)) * 0.6931471805599453
            gl.store(lse_ptr + bh * n_q + offs_m, lse, mask=offs_m < n_q)
        nth += 1
        q_slot = nth % Q_STAGES
        mbarrier.wait(q_full.index(q_slot), (nth // Q_STAGES) & 1)
        tile = gl.max(tile_smem.index(q_slot).load(note), 0)
    tma.store_wait(0)


_RUN_TIME = [
    *("counts_ptr", "ids_ptr", "scratch_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr"),
    *("lse_ptr", "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
    *("heads", "tiles_per_head", "tiles", "width", "programs", "n_q", "n_k", "key_blocks"),
]


@gluon.jit(do_not_specialize=_RUN_TIME)
def _forward(
    q_desc, k_desc, v_desc, o_desc,
    counts_ptr, ids_ptr, scratch_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, lse_ptr,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, tiles_per_head, tiles, width, programs, n_q, n_k, key_blocks,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, V_BYTES: gl.constexpr,
    HAS_LSE: gl.constexpr,
):  # fmt: skip
    q = _ring(q_desc, CONSUMERS * Q_STAGES, 64, D)
    k = _ring(k_desc, STAGES, BLOCK_N, D)
    if V_BYTES == 1:
        v = _ring(v_desc, STAGES, D, BLOCK_N)
    else:
        v = _ring(v_desc, STAGES, BLOCK_N, D)
    o = _ring(o_desc, CONSUMERS, 64, D)
    note: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_smem = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], note)
    smem = (q, k, v, o)
    bars = (
        _barriers(Q_STAGES, 1), _barriers(Q_STAGES, CONSUMERS),
        _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS),
        _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS),
    )  # fmt: skip
    work = (
        counts_ptr, ids_ptr, scratch_ptr + 1, scratch_ptr,
        stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
        heads, tiles_per_head, tiles, width, programs,
    )  # fmt: skip
    descs = (q_desc, k_desc, v_desc, o_desc)
    scales = (q_scale_ptr, k_scale_ptr, v_scale_ptr)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                descs, smem, tile_smem, bars, work, scales, lse_ptr, n_q, n_k, key_blocks,
                CONSUMERS, TILES_PER_ROW, BLOCK_N, D, STAGES, Q_STAGES, V_BYTES,
                HAS_LSE, gl.constexpr(0),
            )),
            (_consume, (
                descs, smem, tile_smem, bars, work, scales, lse_ptr, n_q, n_k, key_blocks,
                CONSUMERS, TILES_PER_ROW, BLOCK_N, D, STAGES, Q_STAGES, V_BYTES,
                HAS_LSE, gl.constexpr(1),
            )),
            (_produce, (
                descs, smem, tile_smem, bars, work,
                CONSUMERS, TILES_PER_ROW, BLOCK_N, D, STAGES, Q_STAGES, V_BYTES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
