# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""Block-sparse attention forward in Gluon for Hopper: TMA, mbarriers, warp-specialised wgmma.

Shapes, lists and results as in `reference`; `hopper` launches it. bfloat16 or float16 in and out,
float32 accumulation. A tile is 64 query rows for each of CONSUMERS warpgroups; a key tile is a
list entry or half of one. D = D1 + D2 channels (D2 = 0 for none); channels beyond the tensor's are
read as zeros and not written.

Persistent CTAs take tiles from a counter, heads in descending order of work. A producer warp walks
the lists and fills rings of query, K and V tiles by TMA (`gluon_produce`: K_STAGES, V_STAGES,
Q_STAGES, AHEAD). The softmax of one tile overlaps matrix products, either its own consumer's or
another program's (`gluon_consume`: OVERLAP, PINGPONG, Q_REGISTERS, RESCALE; `gluon_softmax`). The
last entry of a list goes first: ids ascend, so it alone can be ragged and masked. TMA clips every
box to the tensor, so an id out of range reads nothing outside. Which options a launch has is in
configs.yaml.

Cost: 4 D FLOPs per kept (query, key) pair; 4 D BLOCK_K bytes, mostly from L2, per list entry.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .gluon_consume import _consume
from .gluon_produce import _produce, _rings

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
    CONSUMERS: gl.constexpr, TILES_PER_ROW: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_STAGES: gl.constexpr, AHEAD: gl.constexpr,
    OVERLAP: gl.constexpr, PINGPONG: gl.constexpr, Q_REGISTERS: gl.constexpr,
    RESCALE: gl.constexpr, HAS_LSE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    descs = (q_desc, q2_desc, k_desc, k2_desc, v_desc, v2_desc, o_desc, o2_desc)
    gl.static_assert(Q_STAGES > 0 or Q_REGISTERS, "the slot of Q is V's before the tile is done")
    gl.static_assert(OVERLAP or RESCALE == "lazy", "in turn there is one place to rescale at")
    gl.static_assert(not PINGPONG or (OVERLAP and CONSUMERS == 2), "there is nobody to take turns")
    smem, tile_smem, bars = _rings(
        descs, CONSUMERS, BLOCK_N, D1, D2, K_STAGES, V_STAGES, Q_STAGES, PINGPONG
    )
    work = (
        counts_ptr, ids_ptr, scratch_ptr + 1, scratch_ptr,
        stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
        heads, tiles_per_head, tiles, width, programs,
    )  # fmt: skip
    fence_async_shared()
    # NOTE: constexprs survive only in a tuple that is written at the call (triton 3.6.0).
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
                    CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N, D1, D2, K_STAGES, V_STAGES,
                    Q_STAGES, OVERLAP, PINGPONG, Q_REGISTERS, RESCALE, HAS_LSE, gl.constexpr(0),
                )),
                (_consume, (
                    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
                    CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N, D1, D2, K_STAGES, V_STAGES,
                    Q_STAGES, OVERLAP, PINGPONG, Q_REGISTERS, RESCALE, HAS_LSE, gl.constexpr(1),
                )),
                (_produce, (
                    descs, smem, tile_smem, bars, work, n_k,
                    CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N, D1, D2,
                    K_STAGES, V_STAGES, Q_STAGES, AHEAD,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    descs, smem, tile_smem, bars, work, lse_ptr, n_q, n_k, qk_scale,
                    CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N, D1, D2, K_STAGES, V_STAGES,
                    Q_STAGES, OVERLAP, False, Q_REGISTERS, RESCALE, HAS_LSE, gl.constexpr(0),
                )),
                (_produce, (
                    descs, smem, tile_smem, bars, work, n_k,
                    CONSUMERS, TILES_PER_ROW, BLOCK_K, BLOCK_N, D1, D2,
                    K_STAGES, V_STAGES, Q_STAGES, AHEAD,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
