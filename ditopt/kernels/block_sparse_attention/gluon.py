"""Block-sparse attention forward in Gluon for Hopper (sm_90): TMA, mbarriers, warp-specialised wgmma.

Shapes, lists and results as in `reference`; block_q = 128, block_k = BLOCK_N in {64, 128}, head size D in
{64, 128}; bfloat16 or float16 in and out, float32 accumulation.

One persistent CTA per SM: a producer warp walks the lists and fills rings of K and V tiles (TMA);
two consumer warpgroups own 64 query rows each and overlap the softmax of one tile with the two matrix products
around it (FlashAttention-3, arXiv 2407.08608, section 3). The last entry of a list goes first: ids ascend,
so it alone can be ragged. TMA clips every box to the tensor, so an id out of range reads nothing.
Cost: 4 D FLOPs per kept (query, key) pair; 4 D BLOCK_N bytes from L2 per list entry.
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


@gluon.jit
def _locate(order_ptr, tile, q_blocks, heads, HAS_ORDER: gl.constexpr):  # type: ignore[no-untyped-def]
    """(b, h, query block) of a linear tile number; tiles of one head are neighbours (K, V stay in L2)."""
    bh = tile // q_blocks
    row = tile - bh * q_blocks
    if HAS_ORDER:
        bh = gl.load(order_ptr + bh)
    b = bh // heads
    return b, bh - b * heads, row


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    counts_ptr, ids_ptr, order_ptr, counter_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, q_blocks, tiles, width, programs,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, HAS_ORDER: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = k_smem.shape[4]
    note: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    nth = 0
    tile = gl.program_id(0)
    while tile < tiles:
        # The next tile is asked for a whole tile ahead, so that nobody waits for the counter.
        following = gl.atomic_add(counter_ptr, 1) + programs
        b, h, row = _locate(order_ptr, tile, q_blocks, heads, HAS_ORDER)
        count = gl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
        count = gl.minimum(gl.maximum(count, 0), width)
        base = ids_ptr + b.to(gl.int64) * stride_ib + h.to(gl.int64) * stride_ih + row.to(gl.int64) * stride_iq
        q_slot = nth % Q_STAGES
        mbarrier.wait(q_empty.index(q_slot), ((nth // Q_STAGES) & 1) ^ 1)
        tile_smem.index(q_slot).store(gl.full([1], tile, gl.int32, note))
        mbarrier.expect(q_full.index(q_slot), 2 * 64 * D * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, row * 128 + half * 64, 0], q_full.index(q_slot), q_smem.index(q_slot * 2 + half)
            )
        nth += 1
        tile = following
        for j in range(0, count):
            start = gl.load(base + (count - 1 - j)) * BLOCK_N
            slot = it % STAGES
            phase = ((it // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(k_desc, [b, h, start, 0], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(v_desc, [b, h, start, 0], v_full.index(slot), v_smem.index(slot))
            it += 1
    q_slot = nth % Q_STAGES
    mbarrier.wait(q_empty.index(q_slot), ((nth // Q_STAGES) & 1) ^ 1)
    tile_smem.index(q_slot).store(gl.full([1], tiles, gl.int32, note))
    mbarrier.arrive(q_full.index(q_slot), count=1)


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    o_desc, q_smem, k_smem, v_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    counts_ptr, ids_ptr, order_ptr, counter_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, q_blocks, tiles, width, programs, n_k, qk_scale,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, HAS_ORDER: gl.constexpr,
    PINGPONG: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = k_smem.shape[4]
    dtype: gl.constexpr = k_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    it = 0
    nth = 0
    turns = 0
    if PINGPONG and HALF == 1:
        mbarrier.arrive(turn.index(0), count=1)
    note: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(q_full.index(0), 0)
    tile = gl.max(tile_smem.index(0).load(note), 0)
    while tile < tiles:
        b, h, row = _locate(order_ptr, tile, q_blocks, heads, HAS_ORDER)
        count = gl.load(counts_ptr + b * stride_cb + h * stride_ch + row)
        count = gl.minimum(gl.maximum(count, 0), width)
        base = ids_ptr + b.to(gl.int64) * stride_ib + h.to(gl.int64) * stride_ih + row.to(gl.int64) * stride_iq
        q_slot = nth % Q_STAGES
        q = q_smem.index(q_slot * 2 + HALF).reshape([64, D])
        o = gl.zeros([64, D], gl.float32, o_layout)
        l = gl.zeros([64], gl.float32, s_row)
        if count > 0:
            last = gl.load(base + count - 1) * BLOCK_N
            slot = it % STAGES
            mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
            zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
            s = warpgroup_mma(
                q, k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(0, (s,))
            mbarrier.arrive(k_empty.index(slot), count=1)
            offs = last + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
            s = gl.where(((offs >= 0) & (offs < n_k))[None, :], s, float("-inf"))
            m = gl.max(s, 1)
            m = gl.where(m == float("-inf"), 0.0, m * qk_scale)
            p = gl.exp2(s * qk_scale - m[:, None])
            l = gl.sum(p, 1)
            p = gl.convert_layout(p.to(dtype), p_layout)
            following = it + 1
            mbarrier.wait(k_full.index(following % STAGES), (following // STAGES) & 1, count > 1)
            for j in range(1, count):
                following = it + 1
                next_slot = following % STAGES
                if PINGPONG:
                    mbarrier.wait(turn.index(HALF), turns & 1)
                    turns += 1
                s = warpgroup_mma(
                    q, k_smem.index(next_slot).reshape([BLOCK_N, D]).permute((1, 0)), zero,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                slot = it % STAGES
                mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
                o = warpgroup_mma(p, v_smem.index(slot).reshape([BLOCK_N, D]), o, is_async=True)
                if PINGPONG:
                    mbarrier.arrive(turn.index(1 - HALF), count=1)
                s = warpgroup_mma_wait(1, (s,))
                mbarrier.arrive(k_empty.index(next_slot), count=1)
                m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
                alpha = gl.exp2(m - m_new)
                m = m_new
                pf = gl.exp2(s * qk_scale - m[:, None])
                l = l * alpha + gl.sum(pf, 1)
                p_next = gl.convert_layout(pf.to(dtype), p_layout)
                # This wait also keeps ptxas from moving the next one above the softmax.
                after = it + 2
                mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, j + 1 < count)
                o = warpgroup_mma_wait(0, (o,))
                mbarrier.arrive(v_empty.index(slot), count=1)
                p = p_next
                o = o * gl.convert_layout(alpha, o_row)[:, None]
                it = following
            slot = it % STAGES
            mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
            o = warpgroup_mma(p, v_smem.index(slot).reshape([BLOCK_N, D]), o, is_async=True)
            o = warpgroup_mma_wait(0, (o,))
            mbarrier.arrive(v_empty.index(slot), count=1)
            it += 1
        inverse = 1.0 / gl.where(l == 0.0, 1.0, l)
        o = o * gl.convert_layout(inverse, o_row)[:, None]
        q.store(o.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            o_desc, [b, h, row * 128 + HALF * 64, 0], q_smem.index(q_slot * 2 + HALF)
        )
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        nth += 1
        q_slot = nth % Q_STAGES
        mbarrier.wait(q_full.index(q_slot), (nth // Q_STAGES) & 1)
        tile = gl.max(tile_smem.index(q_slot).load(note), 0)


@gluon.jit
def _forward(  # type: ignore[no-untyped-def]
    q_desc, k_desc, v_desc, o_desc, counts_ptr, ids_ptr, order_ptr, counter_ptr,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, q_blocks, tiles, width, programs, n_k, qk_scale,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    HAS_ORDER: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2 * Q_STAGES, 1, 1, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    tile_smem = gl.allocate_shared_memory(
        gl.int32, [Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                o_desc, q_smem, k_smem, v_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
                counts_ptr, ids_ptr, order_ptr, counter_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
                heads, q_blocks, tiles, width, programs, n_k, qk_scale,
                BLOCK_N, STAGES, Q_STAGES, HAS_ORDER, PINGPONG, gl.constexpr(0),
            )),
            (_consume, (
                o_desc, q_smem, k_smem, v_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
                counts_ptr, ids_ptr, order_ptr, counter_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
                heads, q_blocks, tiles, width, programs, n_k, qk_scale,
                BLOCK_N, STAGES, Q_STAGES, HAS_ORDER, PINGPONG, gl.constexpr(1),
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, tile_smem, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, counts_ptr, ids_ptr, order_ptr, counter_ptr, stride_cb, stride_ch, stride_ib,
                stride_ih, stride_iq, heads, q_blocks, tiles, width, programs,
                BLOCK_N, STAGES, Q_STAGES, HAS_ORDER,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(  # type: ignore[no-untyped-def]
    q, k, v, out, counts, ids, order, scale, block_k, stages, q_stages, pingpong
) -> None:
    import torch
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    q_desc = TensorDescriptor.from_tensor(q, [1, 1, 64, d], layout)
    k_desc = TensorDescriptor.from_tensor(k, [1, 1, block_k, d], layout)
    v_desc = TensorDescriptor.from_tensor(v, [1, 1, block_k, d], layout)
    o_desc = TensorDescriptor.from_tensor(out, [1, 1, 64, d], layout)
    q_blocks = (n_q + 127) // 128
    tiles = q_blocks * b * h
    programs = min(torch.cuda.get_device_properties(q.device).multi_processor_count, tiles)
    counts = counts.expand(b, h, -1)
    ids = ids.expand(b, h, -1, -1)
    _forward[(programs,)](
        q_desc, k_desc, v_desc, o_desc, counts, ids, order if order is not None else counts,
        torch.zeros(1, dtype=torch.int32, device=q.device), counts.stride(0), counts.stride(1), ids.stride(0), ids.stride(1), ids.stride(2),
        h, q_blocks, tiles, ids.shape[-1], programs, n_k, scale * 1.4426950408889634,
        BLOCK_N=block_k, D=d, STAGES=stages, Q_STAGES=q_stages, HAS_ORDER=order is not None,
        PINGPONG=pingpong, num_warps=4,
    )  # fmt: skip
