# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""The loads of `gluon`'s kernel: rings of tiles in shared memory and the warp that fills them.

A list is walked from its end, its entries of BLOCK_K keys in tiles of BLOCK_N (`_key_tiles`).

A ring is a row of slots with two mbarriers a slot: full (its bytes have arrived) and empty (every
consumer is done with it). Queries, K and V have one each; with Q_STAGES = 0 the query tile goes
through V's ring, which then lends its slots to queries, V and the staged output in turn. The number
of a tile travels beside its queries; `work[11]`, one more than the last, says that there is none.

With AHEAD tiles are fetched in the order in which `gluon_consume` uses them, which starts the next
q k^T before p v: K 0, K 1, V 0, K 2, V 1, ... Otherwise K and V of an entry follow each other.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# What producer and consumers share. `descs` and `smem`: q, k, v (and in `descs` the output), each
# for both channel ranges. `bars`: q full, q empty, k full, k empty, v full, v empty, and with
# PINGPONG turn. `work`: counts, ids, order and counter pointers; strides of counts (b, h) and ids
# (b, h, q); heads, tiles of a head, tiles in all, width of the lists, programs.


@gluon.jit
def _ring(desc, slots: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [slots, 1, 1, ROWS, COLS], desc.layout)


@gluon.jit
def _barriers(slots: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(slots):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _rings(
    descs, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
):  # fmt: skip
    """`smem`, the numbers of tiles, and `bars`, all empty."""
    k1 = _ring(descs[2], K_STAGES, BLOCK_N, D1)
    v1 = _ring(descs[4], V_STAGES, BLOCK_N, D1)
    v_full = _barriers(V_STAGES, 1)
    v_empty = _barriers(V_STAGES, CONSUMERS)
    if Q_STAGES == 0:
        gl.static_assert(CONSUMERS == 1 and BLOCK_N == 64 and D2 == 0, "a tile of Q is one of V")
        q1 = v1
        q_full = v_full
        q_empty = v_empty
    else:
        q1 = _ring(descs[0], CONSUMERS * Q_STAGES, 64, D1)
        q_full = _barriers(Q_STAGES, 1)
        q_empty = _barriers(Q_STAGES, CONSUMERS)
    if D2 > 0:
        q2 = _ring(descs[1], CONSUMERS * Q_STAGES, 64, D2)
        k2 = _ring(descs[3], K_STAGES, BLOCK_N, D2)
        v2 = _ring(descs[5], V_STAGES, BLOCK_N, D2)
    else:
        q2 = q1
        k2 = k1
        v2 = v1
    # NOTE: no barrier that nobody uses. Its memory would be free for other things (triton 3.6.0 put
    # the atomic's result there) while to the hardware it stays a barrier: now and then, and often
    # after another process had its turn on the GPU, 0x1FFFFE was read instead of the next tile's
    # number, and that tile was lost.
    turn = q_full  # stands for none
    if PINGPONG:
        turn = _barriers(2, 1)
    note: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    NOTES: gl.constexpr = Q_STAGES if Q_STAGES > 0 else V_STAGES
    tile_smem = gl.allocate_shared_memory(gl.int32, [NOTES, 1], note)
    bars = (
        q_full, q_empty, _barriers(K_STAGES, 1), _barriers(K_STAGES, CONSUMERS),
        v_full, v_empty, turn,
    )  # fmt: skip
    return (q1, q2, k1, k2, v1, v2), tile_smem, bars


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
def _key_tiles(ids, count, n_k, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr):
    """(key tiles of a list, where the one that goes first begins).

    An entry is one tile or two. Of the last entry a second tile without keys is left out, so that
    only the tile that goes first can be ragged. The list must have room for an entry.
    """
    tiles = count
    first = gl.load(ids + gl.maximum(count - 1, 0)) * BLOCK_K
    if BLOCK_N < BLOCK_K:
        gl.static_assert(2 * BLOCK_N == BLOCK_K, "an entry is one tile or two")
        second = (first >= 0) & (first + BLOCK_N < n_k)
        tiles = 2 * count - gl.where(second | (count == 0), 0, 1)
        first += gl.where(second, BLOCK_N, 0)
    return tiles, first


@gluon.jit
def _first_key(ids, tile, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where key tile ``tile`` of a list begins; a tile before the first has the first's place."""
    tile = gl.maximum(tile, 0)
    PARTS: gl.constexpr = BLOCK_K // BLOCK_N
    return gl.load(ids + tile // PARTS) * BLOCK_K + (tile % PARTS) * BLOCK_N


@gluon.jit
def _announce(tile_smem, bars, nth, tile, RING: gl.constexpr):
    """The ``nth`` slot for queries, once it is empty, with the tile's number beside it."""
    note: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = nth % RING
    mbarrier.wait(bars[1].index(slot), ((nth // RING) & 1) ^ 1)
    tile_smem.index(slot).store(gl.full([1], tile, gl.int32, note))
    return slot


@gluon.jit
def _announced(tile_smem, bars, nth, RING: gl.constexpr):
    """The number of the tile in the ``nth`` slot for queries, once these are there."""
    note: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = nth % RING
    mbarrier.wait(bars[0].index(slot), (nth // RING) & 1)
    return gl.max(tile_smem.index(slot).load(note), 0)


@gluon.jit
def _fetch(desc1, desc2, smem1, smem2, slot, bar, b, h, row, D1: gl.constexpr, D2: gl.constexpr):
    """One tile of rows, both channel ranges, into ring slot ``slot``; ``bar`` expects the bytes."""
    tma.async_copy_global_to_shared(desc1, [b, h, row, 0], bar, smem1.index(slot))
    if D2 > 0:
        tma.async_copy_global_to_shared(desc2, [b, h, row, D1], bar, smem2.index(slot))


@gluon.jit
def _push(
    descs, smem, bars, nth, b, h, row,
    OF: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
    D1: gl.constexpr, D2: gl.constexpr,
):  # fmt: skip
    """The ``nth`` tile of a ring, K (``OF`` = 2) or V (4), into its slot once that is empty."""
    slot = nth % STAGES
    full = bars[OF].index(slot)
    mbarrier.wait(bars[OF + 1].index(slot), ((nth // STAGES) & 1) ^ 1)
    mbarrier.expect(full, BLOCK_N * (D1 + D2) * 2)
    _fetch(descs[OF], descs[OF + 1], smem[OF], smem[OF + 1], slot, full, b, h, row, D1, D2)


@gluon.jit
def _produce(
    descs, smem, tile_smem, bars, work, n_k,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The producer warp: tiles from the counter, their queries, then their lists' K and V."""
    Q_RING: gl.constexpr = Q_STAGES if Q_STAGES > 0 else V_STAGES
    ki = 0
    vi = 0
    nth = 0
    tile = gl.program_id(0)
    while tile < work[11]:
        # The next tile is asked for a whole tile ahead, so that nobody waits for the counter.
        following = gl.atomic_add(work[3], 1) + work[13]
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        slot = _announce(tile_smem, bars, nth, tile, Q_RING)
        full = bars[0].index(slot)
        mbarrier.expect(full, CONSUMERS * 64 * (D1 + D2) * 2)
        for part in gl.static_range(CONSUMERS):
            _fetch(descs[0], descs[1], smem[0], smem[1], slot * CONSUMERS + part, full,
                   b, h, (block * CONSUMERS + part) * 64, D1, D2)  # fmt: skip
        if Q_STAGES == 0:
            vi += 1
        tile = following
        # Read even where the list is empty: `hopper` gives every list room for one entry.
        key_tiles, start = _key_tiles(ids, count, n_k, BLOCK_K, BLOCK_N)
        if AHEAD and key_tiles > 0:
            _push(descs, smem, bars, ki, b, h, start, 2, K_STAGES, BLOCK_N, D1, D2)
            ki += 1
        for j in range(key_tiles):
            after = _first_key(ids, key_tiles - 2 - j, BLOCK_K, BLOCK_N)
            if not AHEAD:
                _push(descs, smem, bars, ki, b, h, start, 2, K_STAGES, BLOCK_N, D1, D2)
                ki += 1
            elif j + 1 < key_tiles:
                _push(descs, smem, bars, ki, b, h, after, 2, K_STAGES, BLOCK_N, D1, D2)
                ki += 1
            _push(descs, smem, bars, vi, b, h, start, 4, V_STAGES, BLOCK_N, D1, D2)
            vi += 1
            start = after
        if Q_STAGES == 0:
            nth = vi
        else:
            nth += 1
    slot = _announce(tile_smem, bars, nth, work[11], Q_RING)
    mbarrier.arrive(bars[0].index(slot), count=1)
