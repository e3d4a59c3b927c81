# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""Block-sparse attention forward in Gluon for Hopper: TMA, mbarriers, warp-specialised wgmma.

Shapes, lists and results as in `reference`; `hopper` launches it. bfloat16 or float16 in and out,
float32 accumulation. A tile is 64 query rows for each of CONSUMERS warpgroups; a key tile is one
list entry. D = D1 + D2 channels (D2 = 0 for none); channels beyond the tensor's are read as zeros
and not written.

Persistent CTAs take tiles from a counter, heads in descending order of work. A producer warp walks
the lists and fills rings of K and V tiles by TMA; each consumer overlaps the softmax of one tile
with the matrix products around it, and with PINGPONG two consumers take turns at the tensor cores
(FlashAttention-3, arXiv 2407.08608, section 3). With Q_REGISTERS q k^T reads the query tile from
registers instead of shared memory; LATE_RESCALE puts the output's rescaling behind the start of the
next q k^T. The last entry of a list goes first: ids ascend, so it alone can be ragged and masked.
TMA clips every box to the tensor, so an id out of range reads nothing outside.

Cost: 4 D FLOPs per kept (query, key) pair; 4 D BLOCK_N bytes, mostly from L2, per list entry.
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

# The functions below share two tuples. `bars`: q full, q empty, k full, k empty, v full, v empty,
# turn. `work`: counts, ids, order and counter pointers; strides of counts (b, h) and ids (b, h, q);
# heads, tiles of a head, tiles in all, width of the lists, programs.


@gluon.jit
def _locate(work, tile, TILES_PER_ROW: gl.constexpr):
    """(b, h, tile of the head, list length, list pointer); a head's tiles are neighbours (L2)."""
    heads = work[9]
    bh = tile // work[10]
    block = tile - bh * work[10]
    bh = gl.load(work[2] + bh)
    b = bh // heads
    h = bh - b * heads
    row = block // TILES_PER_ROW
    count = gl.load(work[0] + b.to(gl.int64) * work[4] + h * work[5] + row)
    count = gl.minimum(gl.maximum(count, 0), work[12])
    ids = work[1] + b.to(gl.int64) * work[6] + h.to(gl.int64) * work[7] + row.to(gl.int64) * work[8]
    return b, h, block, count, ids


@gluon.jit
def _fetch(desc1, desc2, smem1, smem2, slot, bar, b, h, row, D1: gl.constexpr, D2: gl.constexpr):
    """One tile of rows, both channel ranges, into ring slot ``slot``; ``bar`` expects the bytes."""
    tma.async_copy_global_to_shared(desc1, [b, h, row, 0], bar, smem1.index(slot))
    if D2 > 0:
        tma.async_copy_global_to_shared(desc2, [b, h, row, D1], bar, smem2.index(slot))


@gluon.jit
def _produce(
    descs, smem, tile_smem, bars, work,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr,
    D1: gl.constexpr, D2: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    note: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    nth = 0
    tile = gl.program_id(0)
    while tile < work[11]:
        # The next tile is asked for a whole tile ahead, so that nobody waits for the counter.
        following = gl.atomic_add(work[3], 1) + work[13]
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        q_slot = nth % Q_STAGES
        q_full = bars[0].index(q_slot)
        mbarrier.wait(bars[1].index(q_slot), ((nth // Q_STAGES) & 1) ^ 1)
        tile_smem.index(q_slot).store(gl.full([1], tile, gl.int32, note))
        mbarrier.expect(q_full, CONSUMERS * 64 * (D1 + D2) * 2)
        for part in gl.static_range(CONSUMERS):
            _fetch(descs[0], descs[1], smem[0], smem[1], q_slot * CONSUMERS + part, q_full,
                   b, h, (block * CONSUMERS + part) * 64, D1, D2)  # fmt: skip
        nth += 1
        tile = following
        for j in range(count):
            start = gl.load(ids + (count - 1 - j)) * BLOCK_N
            slot = it % STAGES
            phase = ((it // STAGES) & 1) ^ 1
            for s in gl.static_range(2):  # K, then V
                full = bars[2 + 2 * s].index(slot)
                mbarrier.wait(bars[3 + 2 * s].index(slot), phase)
                mbarrier.expect(full, BLOCK_N * (D1 + D2) * 2)
                _fetch(descs[2 + 2 * s], descs[3 + 2 * s], smem[2 + 2 * s], smem[3 + 2 * s], slot,
                       full, b, h, start, D1, D2)  # fmt: skip
            it += 1
    q_slot = nth % Q_STAGES
    mbarrier.wait(bars[1].index(q_slot), ((nth // Q_STAGES) & 1) ^ 1)
    tile_smem.index(q_slot).store(gl.full([1], work[11], gl.int32, note))
    mbarrier.arrive(bars[0].index(q_slot), count=1)


@gluon.jit
def _scores(q1, q2, smem, slot, zero, BLOCK_N: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr):
    """Starts q k^T [64, BLOCK_N] of the K tile in ``slot``; not finished on return."""
    k1 = smem[2].index(slot).reshape([BLOCK_N, D1]).permute((1, 0))
    s = warpgroup_mma(q1, k1, zero, use_acc=False, is_async=True)
    if D2 > 0:
        k2 = smem[3].index(slot).reshape([BLOCK_N, D2]).permute((1, 0))
        s = warpgroup_mma(q2, k2, s, is_async=True)
    return s


@gluon.jit
def _values(p, smem, slot, o1, o2, BLOCK_N: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr):
    """Starts o += p v of the V tile in ``slot``; not finished on return."""
    o1 = warpgroup_mma(p, smem[4].index(slot).reshape([BLOCK_N, D1]), o1, is_async=True)
    if D2 > 0:
        o2 = warpgroup_mma(p, smem[5].index(slot).reshape([BLOCK_N, D2]), o2, is_async=True)
    return o1, o2


@gluon.jit
def _finish(o1, o2, D2: gl.constexpr):
    """Waits for every matrix product of this warpgroup."""
    if D2 > 0:
        o1, o2 = warpgroup_mma_wait(0, (o1, o2))
    else:
        o1 = warpgroup_mma_wait(0, (o1,))
        o2 = o1
    return o1, o2


@gluon.jit
def _rescale(o1, o2, alpha, rows1: gl.constexpr, rows2: gl.constexpr, D2: gl.constexpr):
    """The output so far, in units of the new maximum."""
    o1 = o1 * gl.convert_layout(alpha, rows1)[:, None]
    if D2 > 0:
        o2 = o2 * gl.convert_layout(alpha, rows2)[:, None]
    return o1, o2


@gluon.jit
def _consume(
    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr,
    D1: gl.constexpr, D2: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    PINGPONG: gl.constexpr, Q_REGISTERS: gl.constexpr, LATE_RESCALE: gl.constexpr,
    HAS_LSE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = descs[0].dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o1_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    REST: gl.constexpr = D2 if D2 > 0 else D1
    o2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o1_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows1: gl.constexpr = gl.SliceLayout(1, o1_layout)
    rows2: gl.constexpr = gl.SliceLayout(1, o2_layout)
    note: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    it = 0
    nth = 0
    turns = 0
    if PINGPONG and PART == 1:
        mbarrier.arrive(turn.index(0), count=1)
    mbarrier.wait(q_full.index(0), 0)
    tile = gl.max(tile_smem.index(0).load(note), 0)
    while tile < work[11]:
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        q_slot = nth % Q_STAGES
        q_part = q_slot * CONSUMERS + PART
        q1 = smem[0].index(q_part).reshape([64, D1])
        q2 = smem[1].index(q_part).reshape([64, REST])
        qa = q1
        qb = q2
        if Q_REGISTERS:
            qa = q1.load(q_layout)
            qb = qa
            if D2 > 0:
                qb = q2.load(q_layout)
        o1 = gl.zeros([64, D1], gl.float32, o1_layout)
        o2 = gl.zeros([64, REST], gl.float32, o2_layout)
        m = gl.zeros([64], gl.float32, rows)
        norm = gl.zeros([64], gl.float32, rows)
        alpha = gl.full([64], 1.0, gl.float32, rows)
        zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
        if count > 0:
            start = gl.load(ids + count - 1) * BLOCK_N
            mbarrier.wait(k_full.index(it % STAGES), (it // STAGES) & 1)
            s = _scores(qa, qb, smem, it % STAGES, zero, BLOCK_N, D1, D2)
            s = warpgroup_mma_wait(0, (s,))
            mbarrier.arrive(k_empty.index(it % STAGES), count=1)
            offs = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            s = gl.where(((offs >= 0) & (offs < n_k))[None, :], s, float("-inf"))
            m = gl.max(s, 1)
            m = gl.where(m == float("-inf"), 0.0, m * qk_scale)
            p32 = gl.exp2(s * qk_scale - m[:, None])
            norm = gl.sum(p32, 1)
            p = gl.convert_layout(p32.to(dtype), p_layout)
            ahead = it + 1
            mbarrier.wait(k_full.index(ahead % STAGES), (ahead // STAGES) & 1, count > 1)
            for j in range(1, count):
                ahead = it + 1
                slot = it % STAGES
                if PINGPONG:
                    mbarrier.wait(turn.index(PART), turns & 1)
                    turns += 1
                s = _scores(qa, qb, smem, ahead % STAGES, zero, BLOCK_N, D1, D2)
                if LATE_RESCALE:
                    o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D2)
                mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
                o1, o2 = _values(p, smem, slot, o1, o2, BLOCK_N, D1, D2)
                if PINGPONG:
                    mbarrier.arrive(turn.index(1 - PART), count=1)
                s = warpgroup_mma_wait(2 if D2 > 0 else 1, (s,))
                mbarrier.arrive(k_empty.index(ahead % STAGES), count=1)
                m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
                alpha = gl.exp2(m - m_new)
                m = m_new
                p32 = gl.exp2(s * qk_scale - m[:, None])
                norm = norm * alpha + gl.sum(p32, 1)
                p_next = gl.convert_layout(p32.to(dtype), p_layout)
                # NOTE: without a wait on a barrier here, ptxas (triton 3.6.0) moves the next wait,
                # the one for the products with V, above the softmax, and nothing overlaps.
                after = it + 2
                mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, j + 1 < count)
                o1, o2 = _finish(o1, o2, D2)
                mbarrier.arrive(v_empty.index(slot), count=1)
                p = p_next
                if not LATE_RESCALE:
                    o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D2)
                it = ahead
            if LATE_RESCALE:
                o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D2)
            mbarrier.wait(v_full.index(it % STAGES), (it // STAGES) & 1)
            o1, o2 = _values(p, smem, it % STAGES, o1, o2, BLOCK_N, D1, D2)
            o1, o2 = _finish(o1, o2, D2)
            mbarrier.arrive(v_empty.index(it % STAGES), count=1)
            it += 1
        inverse = 1.0 / gl.where(norm == 0.0, 1.0, norm)
        first_row = (block * CONSUMERS + PART) * 64
        # The query tile is done with: its memory stages the output, which TMA clips and writes.
        q1.store((o1 * gl.convert_layout(inverse, rows1)[:, None]).to(dtype))
        if D2 > 0:
            q2.store((o2 * gl.convert_layout(inverse, rows2)[:, None]).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(descs[6], [b, h, first_row, 0], smem[0].index(q_part))
        if D2 > 0:
            tma.async_copy_shared_to_global(descs[7], [b, h, first_row, D1], smem[1].index(q_part))
        if HAS_LSE:
            # m is in log2 units, the result in natural ones. Empty rows: log2(0) = -inf.
            offs_m = first_row + gl.arange(0, 64, rows)
            lse = (m + gl.log2(norm)) * 0.6931471805599453
            lse_row = lse_ptr + (b * work[9] + h).to(gl.int64) * n_q
            gl.store(lse_row + offs_m, lse, mask=offs_m < n_q)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        nth += 1
        q_slot = nth % Q_STAGES
        mbarrier.wait(q_full.index(q_slot), (nth // Q_STAGES) & 1)
        tile = gl.max(tile_smem.index(q_slot).load(note), 0)


@gluon.jit
def _ring(desc, slots: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [slots, 1, 1, ROWS, COLS], desc.layout)


@gluon.jit
def _barriers(slots: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(slots):
        mbarrier.init(bars.index(i), count=count)
    return bars


_RUN_TIME = [
    *("counts_ptr", "ids_ptr", "scratch_ptr", "lse_ptr"),
    *("stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
    *("heads", "tiles_per_head", "tiles", "width", "programs", "n_q", "n_k", "qk_scale"),
]


@gluon.jit(do_not_specialize=_RUN_TIME)
def _forward(
    q_desc, q2_desc, k_desc, k2_desc, v_desc, v2_desc, o_desc, o2_desc,
    counts_ptr, ids_ptr, scratch_ptr, lse_ptr,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, tiles_per_head, tiles, width, programs, n_q, n_k, qk_scale,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr,
    D1: gl.constexpr, D2: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    PINGPONG: gl.constexpr, Q_REGISTERS: gl.constexpr, LATE_RESCALE: gl.constexpr,
    HAS_LSE: gl.constexpr,
):  # fmt: skip
    q1 = _ring(q_desc, CONSUMERS * Q_STAGES, 64, D1)
    k1 = _ring(k_desc, STAGES, BLOCK_N, D1)
    v1 = _ring(v_desc, STAGES, BLOCK_N, D1)
    if D2 > 0:
        q2 = _ring(q2_desc, CONSUMERS * Q_STAGES, 64, D2)
        k2 = _ring(k2_desc, STAGES, BLOCK_N, D2)
        v2 = _ring(v2_desc, STAGES, BLOCK_N, D2)
    else:
        q2 = q1
        k2 = k1
        v2 = v1
    note: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_smem = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], note)
    smem = (q1, q2, k1, k2, v1, v2)
    bars = (
        _barriers(Q_STAGES, 1), _barriers(Q_STAGES, CONSUMERS),
        _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS),
        _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS), _barriers(2, 1),
    )  # fmt: skip
    work = (
        counts_ptr, ids_ptr, scratch_ptr + 1, scratch_ptr,
        stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
        heads, tiles_per_head, tiles, width, programs,
    )  # fmt: skip
    descs = (q_desc, q2_desc, k_desc, k2_desc, v_desc, v2_desc, o_desc, o2_desc)
    fence_async_shared()
    # NOTE: constexprs survive only in a tuple that is written at the call (triton 3.6.0).
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
                    CONSUMERS, TILES_PER_ROW, BLOCK_N, D1, D2, STAGES, Q_STAGES,
                    PINGPONG, Q_REGISTERS, LATE_RESCALE, HAS_LSE, gl.constexpr(0),
                )),
                (_consume, (
                    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
                    CONSUMERS, TILES_PER_ROW, BLOCK_N, D1, D2, STAGES, Q_STAGES,
                    PINGPONG, Q_REGISTERS, LATE_RESCALE, HAS_LSE, gl.constexpr(1),
                )),
                (_produce, (
                    descs, smem, tile_smem, bars, work, CONSUMERS, TILES_PER_ROW, BLOCK_N, D1, D2,
                    STAGES, Q_STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
                    CONSUMERS, TILES_PER_ROW, BLOCK_N, D1, D2, STAGES, Q_STAGES,
                    False, Q_REGISTERS, LATE_RESCALE, HAS_LSE, gl.constexpr(0),
                )),
                (_produce, (
                    descs, smem, tile_smem, bars, work, CONSUMERS, TILES_PER_ROW, BLOCK_N, D1, D2,
                    STAGES, Q_STAGES,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
