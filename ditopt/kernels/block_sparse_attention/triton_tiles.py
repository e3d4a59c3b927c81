# Kernels are another language: their parameters have no Python types and constexprs are upper case.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806
"""What the plain Triton kernels share: tiles of rows, list entries, bits, head sizes in two parts.

A head size D that is no power of two is D1 + D2 channels (72 = 64 + 16, 96 = 64 + 32), so that
nothing is multiplied with more than 15 zeros; D2 = 0 for none. Loads of keys, values and
queries are guarded by their positions, or ids are clamped: no id reads outside the tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .lists import Partial, Pooled


@triton.jit
def load_columns(
    ptr, offs, inside, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of rows ``offs`` where ``inside``, zeros elsewhere."""
    cols = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    return tl.load(ptr + offs[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile(
    ptr, offs, inside, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """Both channel parts of some rows; the second repeats the first where there is none."""
    x1 = load_columns(ptr, offs, inside, stride, 0, D1, D)
    x2 = x1
    if D2 > 0:
        x2 = load_columns(ptr, offs, inside, stride, D1, D2, D)
    return x1, x2


@triton.jit
def columns_from(
    ptr, first, rows, inside, stride,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Like `load_columns`, of rows ``first`` + ``rows``; without GUARD all of them exist.

    What depends on ``rows`` stays the same from tile to tile: compilers move it out of a loop.
    """
    cols = FIRST + tl.arange(0, WIDTH)
    ptr += tl.cast(first, tl.int64) * stride
    offs = rows[:, None] * stride + cols[None, :]
    if GUARD or FIRST + WIDTH > D:
        mask = (inside if GUARD else rows >= 0)[:, None]
        if FIRST + WIDTH > D:
            mask = mask & (cols < D)[None, :]
        return tl.load(ptr + offs, mask=mask, other=0.0)
    return tl.load(ptr + offs)


@triton.jit
def tile_from(
    ptr, first, rows, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    inside=None, GUARD: tl.constexpr = False,
):  # fmt: skip
    """Like `load_tile`, of rows ``first`` + ``rows``, the latter times stride below 2^31."""
    x1 = columns_from(ptr, first, rows, inside, stride, 0, D1, D, GUARD)
    x2 = x1
    if D2 > 0:
        x2 = columns_from(ptr, first, rows, inside, stride, D1, D2, D, GUARD)
    return x1, x2


@triton.jit
def store_tile(
    ptr, offs, inside, stride, x1, x2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    """Writes both channel parts of the rows that are ``inside``, in the tensor's dtype."""
    rows = ptr + offs[:, None].to(tl.int64) * stride
    cols1 = tl.arange(0, D1)
    mask = inside[:, None] & (cols1 < D)[None, :]
    tl.store(rows + cols1[None, :], x1.to(ptr.dtype.element_ty), mask=mask)
    if D2 > 0:
        cols2 = D1 + tl.arange(0, D2)
        mask = inside[:, None] & (cols2 < D)[None, :]
        tl.store(rows + cols2[None, :], x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def inner(a1, a2, b1, b2, D2: tl.constexpr, IEEE: tl.constexpr):
    """``a b^T`` over both channel parts, float32."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    s = tl.dot(a1, tl.trans(b1), input_precision=precision)
    if D2 > 0:
        s = tl.dot(a2, tl.trans(b2), s, input_precision=precision)
    return s


@triton.jit
def accumulate(acc1, acc2, p, x1, x2, D2: tl.constexpr, IEEE: tl.constexpr):
    """``acc + p x`` in both channel parts; ``p`` in x's dtype."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    acc1 = tl.dot(p, x1, acc1, input_precision=precision)
    if D2 > 0:
        acc2 = tl.dot(p, x2, acc2, input_precision=precision)
    return acc1, acc2


@triton.jit
def entry_tokens(ids_ptr, j, count, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """(block ids, places in their blocks) of tile ``j`` of a list; id -1 where it has ended.

    A tile is a part of one entry, or several entries that are gathered.
    """
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N > BLOCK_K:
        entry = j * (BLOCK_N // BLOCK_K) + cols // BLOCK_K
        block = tl.load(ids_ptr + entry, mask=entry < count, other=-1)
        place = cols % BLOCK_K
    else:
        block = tl.load(ids_ptr + j // (BLOCK_K // BLOCK_N))
        place = (j % (BLOCK_K // BLOCK_N)) * BLOCK_N + cols
    return block, place


@triton.jit
def existing(block, place, lengths_ptr, n_k, BLOCK_K: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """(token positions, which of them exist).

    Compared with one number a block, masks take no registers from one stage of a loop to another.
    """
    known = (block >= 0) & (block < tl.cdiv(n_k, BLOCK_K))
    first = block * BLOCK_K
    end = tl.where(known, n_k - first, 0)
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + block, mask=known, other=0))
    return first + place, place < end


@triton.jit
def split_tokens(
    block, offs, j, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """``offs`` of tile ``j`` as (a number, rows that are the same for all tiles) under WHOLE."""
    first = 0
    if WHOLE:
        first = block * BLOCK_K + (j % (BLOCK_K // BLOCK_N)) * BLOCK_N
        offs = tl.arange(0, BLOCK_N)
    return first, offs


@triton.jit
def load_bias(ptr, offs, inside, HAS_BIAS: tl.constexpr):
    """Natural biases of tokens in log2 units; 0 without any."""
    bias = tl.zeros(offs.shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(ptr + offs, mask=inside, other=0.0) * 1.4426950408889634
    return bias


@triton.jit
def block_bits(
    masks_ptr, mask_id, masks, in_block, place, inside,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which pairs [BLOCK_M, BLOCK_N] of partial blocks exist; ``in_block`` are their query rows."""
    WORDS: tl.constexpr = (BLOCK_K + 31) // 32
    known = (mask_id >= 0) & (mask_id < masks)
    rows = masks_ptr + (mask_id.to(tl.int64) * BLOCK_Q) * WORDS
    if BLOCK_N > BLOCK_K or BLOCK_N < 32:  # words differ from column to column
        words = (rows + place // 32)[None, :] + in_block[:, None] * WORDS
        word = tl.load(words, mask=(known & inside)[None, :], other=0)
    else:
        # One load a row and word: a column picks its word among registers.
        cols = tl.arange(0, BLOCK_N)
        first = rows + (tl.min(place) // 32)
        word = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for i in tl.static_range(BLOCK_N // 32):
            of_row = tl.load(first + in_block * WORDS + i, mask=known & (in_block >= 0), other=0)
            word = tl.where((cols // 32 == i)[None, :], of_row[:, None], word)
    return ((word >> (place % 32)[None, :]) & 1) != 0


@triton.jit
def test_bits(ptr, places, inside):
    """Bits ``places`` of a row of words, False where not ``inside``."""
    words = tl.load(ptr + places // 32, mask=inside, other=0)
    return ((words >> (places % 32)) & 1) != 0


@triton.jit
def seen_bias(bias_ptr, bits_ptr, first, n, BLOCK_N: tl.constexpr):
    """Biases of tokens ``first`` + [BLOCK_N] in log2 units, -inf where unseen or past ``n``.

    As a maximum over two copies: a reduction is done once and handed to the other threads, where
    each would otherwise load a bias and a word for every column that it has.
    """
    offs = first + tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, 2)[None, :] * 0
    inside = offs < n
    bias = load_bias(bias_ptr, offs, inside, True)
    return tl.max(tl.where(test_bits(bits_ptr, offs, inside), bias, float("-inf")), 1)


def split_head_size(d: int) -> tuple[int, int]:
    """``d`` as two power-of-two tiles (second 0 where one fits): 64 -> (64, 0), 72 -> (64, 16)."""
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    if rest == 0:
        return d, 0
    return first, max(16, 1 << (rest - 1).bit_length())


def aligned(x: Tensor) -> Tensor:
    """``x`` [B, H, N, D] itself where rows start at multiples of 8 elements, else a copy."""
    # Memory blocks are aligned: the offset says what the address would, and can be traced.
    starts = (x.storage_offset(), *x.stride()[:3])
    fits = x.stride(3) == 1 and all(start % 8 == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """``stride_<name><axis>`` for the leading axes of ``x``; zeros for None."""
    found = (0,) * len(axes) if x is None else x.stride()
    return {f"stride_{name}{axis}": found[i] for i, axis in enumerate(axes)}


def eighths(name: str, x: Tensor | None) -> dict[str, int]:
    """`strides` (batch, head, token) of an `aligned` tensor in units of 8 elements."""
    token = "m" if name in ("q", "g", "o") else "n"
    return {key: stride // 8 for key, stride in strides(name, x, "bh" + token).items()}


def per_head(x: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """A list-like tensor [Bl, Hl, ...] for all heads, by strides of 0; its last axis contiguous."""
    if x is None:
        return None
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.expand(batch, heads, *x.shape[2:])


def list_arguments(
    batch: int,
    heads: int,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    partial: Partial | None,
    block_lengths: Tensor | None,
    key_bias: Tensor | None,
    pooled: Pooled | None,
) -> dict[str, Tensor | int | None]:
    """What `triton_forward` and the dq kernel are told about lists and options, by name."""
    counts, ids = per_head(kv_num_blocks, batch, heads), per_head(kv_indices, batch, heads)
    assert counts is not None
    assert ids is not None
    some, some_ids, mask_ids, masks = partial or (None,) * 4
    some, some_ids = per_head(some, batch, heads), per_head(some_ids, batch, heads)
    mask_ids = per_head(mask_ids, batch, heads)
    if some_ids is not None and mask_ids is not None and some_ids.stride() != mask_ids.stride():
        some_ids, mask_ids = some_ids.contiguous(), mask_ids.contiguous()
    pooled_k, pooled_v, pooled_bias, bits = pooled or (None,) * 4
    pooled_k = None if pooled_k is None else aligned(pooled_k)
    pooled_v = None if pooled_v is None else aligned(pooled_v)
    key_bias, pooled_bias = per_head(key_bias, batch, heads), per_head(pooled_bias, batch, heads)
    bits = per_head(bits, batch, heads)
    return {
        "counts_ptr": counts,
        "ids_ptr": ids,
        "width": ids.shape[-1],
        **strides("c", counts, "bh"),
        **strides("i", ids, "bhq"),
        "some_counts_ptr": some,
        "some_ids_ptr": some_ids,
        "mask_ids_ptr": mask_ids,
        "masks_ptr": None if masks is None else masks.contiguous(),
        "masks": 0 if masks is None else masks.shape[0],
        "some_width": 0 if some_ids is None else some_ids.shape[-1],
        **strides("sc", some, "bh"),
        **strides("si", some_ids, "bhq"),
        "lengths_ptr": None if block_lengths is None else block_lengths.contiguous(),
        "bias_ptr": key_bias,
        **strides("b", key_bias, "bh"),
        "pooled_k_ptr": pooled_k,
        "pooled_v_ptr": pooled_v,
        "pooled_bias_ptr": pooled_bias,
        "bits_ptr": bits,
        "n_pooled": 0 if pooled_k is None else pooled_k.shape[2],
        **eighths("pk", pooled_k),
        **eighths("pv", pooled_v),
        **strides("pb", pooled_bias, "bh"),
        **strides("w", bits, "bhq"),
    }
