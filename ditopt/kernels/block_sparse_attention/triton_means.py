# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""Block means in Triton: one program a block, reads x once; see `pooling.block_means`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _means(
    x_ptr, out_ptr, lengths_ptr, stride_b, stride_h, stride_n, stride_d, heads, n, d, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    x_ptr += (pair // heads) * stride_b + (pair % heads) * stride_h
    cols = tl.arange(0, D)
    length = tl.minimum(n - block * BLOCK, BLOCK)
    if HAS_LENGTHS:
        length = tl.minimum(length, tl.maximum(tl.load(lengths_ptr + block), 0))
    total = tl.zeros([D], tl.float32)
    for start in range(0, BLOCK, ROWS):
        place = start + tl.arange(0, ROWS)
        rows = (block * BLOCK + place).to(tl.int64)
        mask = (place < length)[:, None] & (cols < d)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_n + cols[None, :] * stride_d, mask=mask, other=0)
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    out = out_ptr + (pair * blocks + block) * d + cols
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=cols < d)


def block_means(x: Tensor, block: int, lengths: Tensor | None) -> Tensor:
    """Means [B, H, ceil(N / block), D] over the tokens of x [B, H, N, D] that exist."""
    batch, heads, n, d = x.shape
    blocks = triton.cdiv(n, block)
    out = torch.empty(batch, heads, blocks, d, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(d)
    rows = min(triton.next_power_of_2(block), max(16, 16384 // columns))
    _means[(blocks, batch * heads)](
        x, out, None if lengths is None else lengths.contiguous(), *x.stride(),
        heads, n, d, blocks,
        BLOCK=block, ROWS=rows, D=columns, HAS_LENGTHS=lengths is not None, num_warps=4,
    )  # fmt: skip
    return out
