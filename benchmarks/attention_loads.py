# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# ruff: noqa: N803, N806, RUF059, B007
"""The loads of the Gluon kernel without its arithmetic: what reading Q, K and V alone takes.

The producer is the kernel's own: the same rings, the same order of fetches. One warpgroup gives
every tile back as soon as it is there, in the order in which the kernel is done with them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ditopt.kernels.block_sparse_attention import hopper
from ditopt.kernels.block_sparse_attention.gluon_produce import (
    _announced,
    _key_tiles,
    _locate,
    _produce,
    _rings,
)
from ditopt.kernels.block_sparse_attention.order import order_heads

if TYPE_CHECKING:
    from torch import Tensor


@gluon.jit
def _drain(
    tile_smem, bars, work, n_k, CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Gives every tile back as soon as it is there."""
    Q_RING: gl.constexpr = Q_STAGES if Q_STAGES > 0 else V_STAGES
    _, q_empty, k_full, k_empty, v_full, v_empty, _ = bars
    ki = 0
    vi = 0
    nth = 0
    tile = _announced(tile_smem, bars, nth, Q_RING)
    while tile < work[11]:
        b, h, block, count, ids = _locate(work, tile, TILES_PER_ROW)
        if Q_STAGES == 0:
            gl.thread_barrier()  # all four warps have read the tile's number
            mbarrier.arrive(q_empty.index(nth % Q_RING), count=CONSUMERS)
            vi += 1
        tiles, start = _key_tiles(ids, count, n_k, BLOCK_K, BLOCK_N)
        for j in range(tiles):
            mbarrier.wait(k_full.index(ki % K_STAGES), (ki // K_STAGES) & 1)
            mbarrier.arrive(k_empty.index(ki % K_STAGES), count=CONSUMERS)
            mbarrier.wait(v_full.index(vi % V_STAGES), (vi // V_STAGES) & 1)
            mbarrier.arrive(v_empty.index(vi % V_STAGES), count=CONSUMERS)
            ki += 1
            vi += 1
        if Q_STAGES == 0:
            nth = vi
        else:
            mbarrier.arrive(q_empty.index(nth % Q_RING), count=CONSUMERS)
            nth += 1
        tile = _announced(tile_smem, bars, nth, Q_RING)


@gluon.jit
def _loads(
    q_desc, k_desc, v_desc, counts_ptr, ids_ptr, scratch_ptr,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, tiles_per_head, tiles, width, programs, n_k,
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    descs = (q_desc, q_desc, k_desc, k_desc, v_desc, v_desc)
    smem, tile_smem, bars = _rings(
        descs, CONSUMERS, BLOCK_N, D, 0, K_STAGES, V_STAGES, Q_STAGES, False
    )
    work = (
        counts_ptr, ids_ptr, scratch_ptr + 1, scratch_ptr,
        stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
        heads, tiles_per_head, tiles, width, programs,
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_drain, (
                tile_smem, bars, work, n_k, CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N,
                K_STAGES, V_STAGES, Q_STAGES,
            )),
            (_produce, (
                descs, smem, tile_smem, bars, work, n_k,
                CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N, D, 0,
                K_STAGES, V_STAGES, Q_STAGES, AHEAD,
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
    boxes = ((q, 64), (k, config.keys), (v, config.keys))
    _loads[(programs,)](
        *(hopper._boxes(x, rows, (d, 0))[0].checked() for x, rows in boxes),
        counts, ids, order_heads(counts), *counts.stride()[:2], *ids.stride()[:3],
        heads, tiles_per_head, tiles, ids.shape[-1], programs, k.shape[2],
        CONSUMERS=consumers, TILES_PER_ROW=block_q // (64 * consumers),
        BLOCK_K=block_k, BLOCK_N=config.keys, D=d,
        K_STAGES=config.k_stages, V_STAGES=config.v_stages, Q_STAGES=config.q_stages,
        AHEAD=config.ahead, num_warps=4, **limit,
    )  # fmt: skip
