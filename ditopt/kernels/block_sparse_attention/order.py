# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""The order in which a persistent kernel takes heads: most work first, so that none is left last.

Any permutation gives the right result; this one balances heads of unequal density.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher


@triton.jit(
    do_not_specialize=[
        *("counts_ptr", "scratch_ptr", "stride_b", "stride_h", "heads", "pairs", "rows")
    ]
)
def _order_heads(
    counts_ptr, scratch_ptr, stride_b, stride_h, heads, pairs, rows,
    PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(batch, head) pairs by total list length, longest first; also clears the tile counter."""
    offs = tl.arange(0, PAIRS)
    base = counts_ptr + (offs // heads).to(tl.int64) * stride_b + (offs % heads) * stride_h
    total = tl.zeros([PAIRS], tl.int32)
    for start in range(0, rows, ROWS):
        cols = start + tl.arange(0, ROWS)
        inside = (offs < pairs)[:, None] & (cols < rows)[None, :]
        total += tl.sum(tl.load(base[:, None] + cols[None, :], mask=inside, other=0), 1)
    total = tl.where(offs < pairs, total, -1)
    before = (total[None, :] > total[:, None]) | (
        (total[None, :] == total[:, None]) & (offs[None, :] < offs[:, None])
    )
    rank = tl.sum(before.to(tl.int32), 1)
    tl.store(scratch_ptr + 1 + rank, offs, mask=offs < pairs)
    tl.store(scratch_ptr, 0)


_launch = Launcher(_order_heads)


def order_heads(counts: Tensor) -> Tensor:
    """Int32 [1 + B * H] of counts [B, H, QB]: a tile counter at zero, then the order."""
    batch, heads, rows = counts.shape
    pairs = batch * heads
    scratch = torch.empty(pairs + 1, dtype=torch.int32, device=counts.device)
    stride_b, stride_h, _ = counts.stride()
    power = triton.next_power_of_2(pairs)
    arguments = (counts, scratch, stride_b, stride_h, heads, pairs, rows, power, 128)
    _launch((counts.device.index, power), 1, arguments, num_warps=8)
    return scratch
