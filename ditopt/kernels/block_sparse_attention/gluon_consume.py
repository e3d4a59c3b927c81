# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""The arithmetic of `gluon`'s kernel: one warpgroup's 64 query rows against their lists.

With OVERLAP the softmax of one key tile runs under the products around it: q k^T of the next tile
and p v of the last one are started before it and waited for behind it (FlashAttention-3, arXiv
2407.08608, section 3.2). Without it products and softmax take turns, which spares the registers of
a second tile of p: two programs of two warpgroups fit a multiprocessor, and overlap each other.
With PINGPONG two warpgroups take turns at starting products (section 3.1), so that one's softmax
runs under the other's products. With Q_REGISTERS q k^T reads the query tile from registers instead
of shared memory. RESCALE says where the output so far is multiplied: "soon", right behind p v;
"late", behind the start of the next q k^T; "lazy", there too (in turn: before p v), and seldom
(`gluon_softmax`).
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

from .gluon_produce import _announced, _key_tiles, _locate
from .gluon_softmax import _first_softmax, _rescale, _softmax


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
def _consume(
    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, PINGPONG: gl.constexpr, Q_REGISTERS: gl.constexpr,
    RESCALE: gl.constexpr, HAS_LSE: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``PART``: 64 rows of each tile, until there is none."""
    dtype: gl.constexpr = descs[0].dtype
    Q_RING: gl.constexpr = Q_STAGES if Q_STAGES > 0 else V_STAGES
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o1_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    REST: gl.constexpr = D2 if D2 > 0 else D1
    o2_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o1_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows1: gl.constexpr = gl.SliceLayout(1, o1_layout)
    rows2: gl.constexpr = gl.SliceLayout(1, o2_layout)
    _, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    ki = 0
    vi = 0
    nth = 0
    turns = 0
    if PINGPONG and PART == 1:
        mbarrier.arrive(turn.index(0), count=1)
    tile = _announced(tile_smem, bars, nth, Q_RING)
    while tile < work[11]:
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        staged = nth % Q_RING  # what holds the queries, and later the output
        q1 = smem[0].index(staged * CONSUMERS + PART).reshape([64, D1])
        q2 = smem[1].index(staged * CONSUMERS + PART).reshape([64, REST])
        qa = q1
        qb = q2
        if Q_REGISTERS:
            qa = q1.load(q_layout)
            qb = qa
            if D2 > 0:
                qb = q2.load(q_layout)
        if Q_STAGES == 0:
            # V may have the slot as soon as all four warps have their queries; without a list
            # there will be no V, and the slot stages the zeros.
            gl.thread_barrier()
            mbarrier.arrive(q_empty.index(staged), count=1, pred=count > 0)
            vi += 1
        o1 = gl.zeros([64, D1], gl.float32, o1_layout)
        o2 = gl.zeros([64, REST], gl.float32, o2_layout)
        m = gl.zeros([64], gl.float32, rows)
        norm = gl.zeros([64], gl.float32, rows)
        alpha = gl.full([64], 1.0, gl.float32, rows)
        zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
        if count > 0:
            tiles, start = _key_tiles(ids, count, n_k, BLOCK_K, BLOCK_N)
            mbarrier.wait(k_full.index(ki % K_STAGES), (ki // K_STAGES) & 1)
            s = _scores(qa, qb, smem, ki % K_STAGES, zero, BLOCK_N, D1, D2)
            s = warpgroup_mma_wait(0, (s,))
            mbarrier.arrive(k_empty.index(ki % K_STAGES), count=1)
            offs = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            s = gl.where(((offs >= 0) & (offs < n_k))[None, :], s, float("-inf"))
            p32, m, norm = _first_softmax(s, qk_scale)
            p = gl.convert_layout(p32.to(dtype), p_layout)
            ki += 1
            mbarrier.wait(k_full.index(ki % K_STAGES), (ki // K_STAGES) & 1, tiles > 1)
            for j in range(1, tiles):
                k_slot = ki % K_STAGES
                v_slot = vi % V_STAGES
                if not OVERLAP:
                    # In turn: p v is done before its registers are those of the next scores.
                    o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D1, D2, RESCALE)
                    mbarrier.wait(v_full.index(v_slot), (vi // V_STAGES) & 1)
                    o1, o2 = _values(p, smem, v_slot, o1, o2, BLOCK_N, D1, D2)
                    o1, o2 = _finish(o1, o2, D2)
                    mbarrier.arrive(v_empty.index(v_slot), count=1)
                if PINGPONG:
                    mbarrier.wait(turn.index(PART), turns & 1)
                    turns += 1
                s = _scores(qa, qb, smem, k_slot, zero, BLOCK_N, D1, D2)
                if OVERLAP:
                    if RESCALE != "soon":
                        o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D1, D2, RESCALE)
                    mbarrier.wait(v_full.index(v_slot), (vi // V_STAGES) & 1)
                    o1, o2 = _values(p, smem, v_slot, o1, o2, BLOCK_N, D1, D2)
                if PINGPONG:
                    mbarrier.arrive(turn.index(1 - PART), count=1)
                # The products with V may run on.
                s = warpgroup_mma_wait((2 if D2 > 0 else 1) if OVERLAP else 0, (s,))
                mbarrier.arrive(k_empty.index(k_slot), count=1)
                p32, m, norm, alpha = _softmax(s, m, norm, qk_scale, RESCALE)
                p_next = gl.convert_layout(p32.to(dtype), p_layout)
                # NOTE: without a wait on a barrier here, ptxas (triton 3.6.0) moves the next wait,
                # the one for the products with V, above the softmax, and nothing overlaps.
                ki += 1
                mbarrier.wait(k_full.index(ki % K_STAGES), (ki // K_STAGES) & 1, j + 1 < tiles)
                if OVERLAP:
                    o1, o2 = _finish(o1, o2, D2)
                    mbarrier.arrive(v_empty.index(v_slot), count=1)
                p = p_next
                if RESCALE == "soon":
                    o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D1, D2, RESCALE)
                vi += 1
            if RESCALE != "soon":
                o1, o2 = _rescale(o1, o2, alpha, rows1, rows2, D1, D2, RESCALE)
            mbarrier.wait(v_full.index(vi % V_STAGES), (vi // V_STAGES) & 1)
            o1, o2 = _values(p, smem, vi % V_STAGES, o1, o2, BLOCK_N, D1, D2)
            o1, o2 = _finish(o1, o2, D2)
            if Q_STAGES == 0:
                staged = vi % V_STAGES  # kept: the queries' slot is V's again
            else:
                mbarrier.arrive(v_empty.index(vi % V_STAGES), count=1)
            vi += 1
        inverse = 1.0 / gl.where(norm == 0.0, 1.0, norm)
        first_row = (block * CONSUMERS + PART) * 64
        # Nobody reads the slot any more: it stages the output, which TMA clips and writes.
        if Q_STAGES == 0:
            gl.thread_barrier()  # the other warps' products read all of the V in it
        out1 = smem[0].index(staged * CONSUMERS + PART)
        out1.reshape([64, D1]).store((o1 * gl.convert_layout(inverse, rows1)[:, None]).to(dtype))
        if D2 > 0:
            out2 = smem[1].index(staged * CONSUMERS + PART)
            out2.reshape([64, D2]).store(
                (o2 * gl.convert_layout(inverse, rows2)[:, None]).to(dtype)
            )
        fence_async_shared()
        tma.async_copy_shared_to_global(descs[6], [b, h, first_row, 0], out1)
        if D2 > 0:
            tma.async_copy_shared_to_global(descs[7], [b, h, first_row, D1], out2)
        if HAS_LSE:
            # m is in log2 units, the result in natural ones. It need not be the maximum: the sum
            # is of 2^(s - m). Empty rows: log2(0) = -inf.
            offs_m = first_row + gl.arange(0, 64, rows)
            lse = (m + gl.log2(norm)) * 0.6931471805599453
            lse_row = lse_ptr + (b * work[9] + h).to(gl.int64) * n_q
            gl.store(lse_row + offs_m, lse, mask=offs_m < n_q)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(staged), count=1)
        if Q_STAGES == 0:
            nth = vi
        else:
            nth += 1
        tile = _announced(tile_smem, bars, nth, Q_RING)
