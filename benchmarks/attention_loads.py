# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# ruff: noqa: N803, RUF059, B007
"""The loads of the Gluon kernel without its arithmetic: what reading K and V alone takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ditopt.kernels.block_sparse_attention import hopper
from ditopt.kernels.block_sparse_attention.gluon import _barriers, _locate, _produce, _ring
from ditopt.kernels.block_sparse_attention.order import order_heads

if TYPE_CHECKING:
    from torch import Tensor


@gluon.jit
def _drain(
    tile_smem, bars, work, CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Gives every tile back as soon as it is there."""
    note: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    it = 0
    nth = 0
    mbarrier.wait(q_full.index(0), 0)
    tile = gl.max(tile_smem.index(0).load(note), 0)
    while tile < work[11]:
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        for j in range(count):
            slot = it % STAGES
            mbarrier.wait(k_full.index(slot), (it // STAGES) & 1)
            mbarrier.arrive(k_empty.index(slot), count=CONSUMERS)
            mbarrier.wait(v_full.index(slot), (it // STAGES) & 1)
            mbarrier.arrive(v_empty.index(slot), count=CONSUMERS)
            it += 1
        mbarrier.arrive(q_empty.index(nth % Q_STAGES), count=CONSUMERS)
        nth += 1
        q_slot = nth % Q_STAGES
        mbarrier.wait(q_full.index(q_slot), (nth // Q_STAGES) & 1)
        tile = gl.max(tile_smem.index(q_slot).load(note), 0)


@gluon.jit
def _loads(
    q_desc, k_desc, v_desc, counts_ptr, ids_ptr, scratch_ptr,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, tiles_per_head, tiles, width, programs,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    q = _ring(q_desc, CONSUMERS * Q_STAGES, 64, D)
    k = _ring(k_desc, STAGES, BLOCK_N, D)
    v = _ring(v_desc, STAGES, BLOCK_N, D)
    note: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_smem = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], note)
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
    fence_async_shared()
    gl.warp_specialize(
        [
            (_drain, (tile_smem, bars, work, CONSUMERS, TILES_PER_ROW, STAGES, Q_STAGES)),
            (_produce, (
                (q_desc, q_desc, k_desc, k_desc, v_desc, v_desc), (q, q, k, k, v, v), tile_smem,
                bars, work, CONSUMERS, TILES_PER_ROW, BLOCK_N, D, 0, STAGES, Q_STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def loads(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor, block_q: int, block_k: int
) -> None:
    """Load what attention over these lists loads; D a power of two."""
    batch, heads, n_q, d = q.shape
    name, processors, _ = hopper.device(q.device.index)
    consumers = 1 if block_q == 64 else 2
    config = hopper.hopper_config(name, consumers, block_k, d)
    counts, ids = counts.expand(batch, heads, -1), ids.expand(batch, heads, -1, -1)
    tiles_per_head = math.ceil(n_q / (64 * consumers))
    tiles = tiles_per_head * batch * heads
    programs = min(processors * config.programs_per_processor, tiles)
    limit = {"maxnreg": config.max_registers} if config.max_registers else {}
    boxes = ((q, 64), (k, block_k), (v, block_k))
    _loads[(programs,)](
        *(hopper._boxes(x, rows, (d, 0))[0].checked() for x, rows in boxes),
        counts, ids, order_heads(counts), *counts.stride()[:2], *ids.stride()[:3],
        heads, tiles_per_head, tiles, ids.shape[-1], programs,
        CONSUMERS=consumers, TILES_PER_ROW=block_q // (64 * consumers), BLOCK_N=block_k, D=d,
        STAGES=config.stages, Q_STAGES=config.q_stages, num_warps=4, **limit,
    )  # fmt: skip
