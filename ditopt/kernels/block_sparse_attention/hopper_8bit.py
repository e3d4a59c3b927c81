"""Launches the 8-bit Gluon kernel: what it takes, its operands, its descriptors."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout

from . import gluon_8bit
from .hopper import _dense_rows, device
from .launch import Box, Launcher
from .ops import empty_output
from .order import order_heads
from .quantize import Quantized, quantize
from .triton_tiles import aligned

CONSUMERS = 2
ROWS = 64 * CONSUMERS
Q_STAGES = 2
STAGES = 2  # deeper rings were no faster: see the README


def reason_to_decline(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why this kernel cannot run the call, or None where it can."""
    if device(q.device.index)[2] != (9, 0):
        return "the 8-bit kernel is for compute capability 9.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the 8-bit kernel takes bfloat16 and float16, q is {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"the 8-bit kernel takes 64 and 128 channels, got {q.shape[-1]}"
    if block_q % ROWS:
        return f"the 8-bit kernel takes multiples of {ROWS} as block_q, got {block_q}"
    if block_k not in (64, 128):
        return f"the 8-bit kernel takes 64 and 128 as block_k, got {block_k}"
    return None


@lru_cache
def _layout(row_bytes: int, element_bits: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(min(128, row_bytes), element_bitwidth=element_bits, rank=4)


def _box(x: Tensor, rows: int, columns: int) -> Box:
    size = x.element_size()
    layout = _layout(columns * size, 8 * size)
    return Box(x, x.shape, x.stride(), [1, 1, rows, columns], layout)


_launch = Launcher(gluon_8bit._forward)


def forward_quantized(
    operands: Quantized,
    out: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    *,
    lse: Tensor | None = None,
) -> None:
    """Attention of quantised operands into ``out`` [B, H, N_q, D]."""
    batch, heads, n_q, d = out.shape
    n_k = operands.k.shape[2]
    counts = _dense_rows(kv_num_blocks).expand(batch, heads, -1)
    ids = _dense_rows(kv_indices).expand(batch, heads, -1, -1)
    scratch = order_heads(counts)
    _, processors, _ = device(out.device.index)
    tiles_per_head = math.ceil(n_q / ROWS)
    tiles = tiles_per_head * batch * heads
    programs = min(processors, tiles)
    values = operands.v_scale is not None
    constants = (
        *(CONSUMERS, block_q // ROWS, block_k, d, STAGES, Q_STAGES),
        *(1 if values else 2, lse is not None),
    )
    v_box = _box(operands.v, d, block_k) if values else _box(operands.v, block_k, d)
    arguments = (
        _box(operands.q, 64, d), _box(operands.k, block_k, d), v_box, _box(out, 64, d),
        counts, ids, scratch, operands.q_scale, operands.k_scale,
        operands.v_scale if values else operands.q_scale,
        operands.q_scale if lse is None else lse,
        *counts.stride()[:2], *ids.stride()[:3],
        heads, tiles_per_head, tiles, ids.shape[-1], programs,
        n_q, n_k, operands.k_scale.shape[-1], *constants,
    )  # fmt: skip
    _launch((out.device.index, out.dtype, constants), programs, arguments, num_warps=4)


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
    values: bool,
) -> Tensor:
    """Output [B, H, N_q, D]; quantises, with V too where ``values``, and attends."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = empty_output(q, v)
    operands = quantize(q, k, v, block_k, scale, values=values)
    forward_quantized(operands, out, kv_num_blocks, kv_indices, block_q, block_k)
    return out
