# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803
"""Transposed lists in Triton: count, scan, scatter; equals `lists.transpose`, waits for nothing.

Query blocks are dealt to at most `CHUNKS` programs a head, each with counters of its own, so that
entries of one key block come out in the order of their query blocks and gradients sum in one order.
Cost: O(entries + CHUNKS * key blocks) memory and time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lists import Transposed
from .triton_tiles import per_head

CHUNKS = 64


@triton.jit
def _walk(
    counts_ptr, ids_ptr, cursor_ptr, entries_ptr,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_iq,
    heads, rows, width, key_blocks, chunks,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Counts the entries of ROWS query blocks by key block, or puts them where their cursor is."""
    chunk = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b = pair // heads
    h = pair % heads
    counts_ptr += b * stride_cb + h * stride_ch
    ids_ptr += b * stride_ib + h * stride_ih
    cursor_ptr += pair * key_blocks * chunks + chunk
    entries_ptr += pair * rows * width
    for row in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, rows)):
        count = tl.minimum(tl.load(counts_ptr + row), width)
        for start in range(0, count, WIDTH):
            place = start + tl.arange(0, WIDTH)
            used = place < count
            block = tl.load(ids_ptr + row * stride_iq + place, mask=used, other=-1)
            used = used & (block >= 0) & (block < key_blocks)
            cursor = tl.where(used, block, 0).to(tl.int64) * chunks
            at = tl.atomic_add(cursor_ptr + cursor, 1, mask=used)
            if SCATTER:
                # Counted by the same rule, so there is room; the guard is for lists that change.
                used = used & (at >= 0) & (at < rows * width)
                tl.store(entries_ptr + at, row * width + place, mask=used)
                tl.debug_barrier()  # the next query block comes after this one


def transpose(counts: Tensor, ids: Tensor, key_blocks: int) -> Transposed:
    """The entries [Bl, Hl, QB, width] of a list by key block."""
    batch, heads, rows, width = ids.shape
    contiguous = per_head(counts, batch, heads), per_head(ids, batch, heads)
    counts, ids = (x for x in contiguous if x is not None)
    per_chunk = triton.cdiv(rows, CHUNKS)
    chunks = triton.cdiv(rows, per_chunk)
    cursor = ids.new_zeros(batch, heads, key_blocks * chunks)
    entries = torch.empty(batch, heads, rows * width, dtype=torch.int32, device=ids.device)

    def walk(scatter: bool) -> None:
        _walk[(chunks, batch * heads)](
            counts, ids, cursor, entries,
            counts.stride(0), counts.stride(1), ids.stride(0), ids.stride(1), ids.stride(2),
            heads, rows, width, key_blocks, chunks,
            ROWS=per_chunk, WIDTH=min(1024, triton.next_power_of_2(width)), SCATTER=scatter,
            num_warps=4,
        )  # fmt: skip

    walk(scatter=False)
    ends = cursor.cumsum(-1, dtype=torch.int32)
    starts = torch.nn.functional.pad(ends[..., chunks - 1 :: chunks], (1, 0))
    cursor = ends - cursor
    walk(scatter=True)
    return Transposed(starts, entries)
