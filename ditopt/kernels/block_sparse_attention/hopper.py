"""Launches the Gluon kernel: what it takes, its tiles, its descriptors."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout

from . import gluon
from .configs import hopper_config
from .launch import Box, Launcher
from .ops import empty_output
from .order import order_heads
from .triton import aligned


def split_head_size(d: int) -> tuple[int, int]:
    """Channel tiles (D1, D2) that cover ``d``: powers of two whose products with zeros stay few."""
    for tiles in ((32, 0), (64, 0), (64, 16), (64, 32)):
        if d <= sum(tiles):
            return tiles
    return 128, 0


@lru_cache
def device(index: int | None) -> tuple[str, int, tuple[int, int]]:
    """(name, multiprocessors, compute capability); None is the current device."""
    properties = torch.cuda.get_device_properties(index)
    return (
        properties.name,
        properties.multi_processor_count,
        (properties.major, properties.minor),
    )


def reason_to_decline(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why this kernel cannot run the call, or None where it can."""
    if device(q.device.index)[2] != (9, 0):
        return "the Gluon kernel is for compute capability 9.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Gluon kernel takes bfloat16 and float16, q is {q.dtype}"
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 128:
        return f"the Gluon kernel takes 16 to 128 channels in multiples of 8, got {q.shape[-1]}"
    if block_q != 64 and block_q % 128:
        return f"the Gluon kernel takes 64 and multiples of 128 as block_q, got {block_q}"
    if block_k not in (64, 128):
        return f"the Gluon kernel takes 64 and 128 as block_k, got {block_k}"
    return None


def _dense_rows(lists: Tensor) -> Tensor:
    """Lists whose last axis lies densely, as the kernel reads it."""
    return lists if lists.stride(-1) == 1 else lists.contiguous()


@lru_cache
def _layout(columns: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(min(128, 2 * columns), element_bitwidth=16, rank=4)


def _boxes(x: Tensor, rows: int, tiles: tuple[int, int]) -> tuple[Box, Box]:
    """Boxes of ``rows`` tokens by each channel tile; the second repeats the first where unused."""
    first = Box(x, x.shape, x.stride(), [1, 1, rows, tiles[0]], _layout(tiles[0]))
    if not tiles[1]:
        return first, first
    return first, first._replace(block_shape=[1, 1, rows, tiles[1]], layout=_layout(tiles[1]))


_launch = Launcher(gluon._forward)


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
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, H, N_q, D] and, if asked for, natural-log LSE float32 [B, H, N_q]."""
    batch, heads, n_q, d = q.shape
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = empty_output(q, v)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if return_lse else None
    counts = _dense_rows(kv_num_blocks).expand(batch, heads, -1)
    width = kv_indices.shape[-1]
    room = kv_indices if width else kv_indices.new_zeros(*kv_indices.shape[:3], 1)
    ids = _dense_rows(room).expand(batch, heads, -1, -1)
    scratch = order_heads(counts)
    name, processors, _ = device(q.device.index)
    tiles = split_head_size(d)
    consumers = 1 if block_q == 64 else 2
    config = hopper_config(name, consumers, block_k, d)
    tiles_per_head = math.ceil(n_q / (64 * consumers))
    programs = min(processors * config.programs_per_processor, tiles_per_head * batch * heads)
    limit = {"maxnreg": config.max_registers} if config.max_registers else {}
    constants = (
        *(consumers, block_q // (64 * consumers), block_k, config.keys, *tiles),
        *(config.k_stages, config.v_stages, config.q_stages, config.ahead, config.overlap),
        *(config.pingpong, config.q_registers, config.rescale, return_lse),
        config.worker_registers,
    )
    arguments = (
        *_boxes(q, 64, tiles), *_boxes(k, config.keys, tiles),
        *_boxes(v, config.keys, tiles), *_boxes(out, 64, tiles),
        counts, ids, scratch, scratch if lse is None else lse,
        *counts.stride()[:2], *ids.stride()[:3],
        heads, tiles_per_head, tiles_per_head * batch * heads, width, programs,
        n_q, k.shape[2], scale * math.log2(math.e), *constants,
    )  # fmt: skip
    _launch((q.device.index, q.dtype, constants), programs, arguments, num_warps=4, **limit)
    return out, lse
