"""Checks of arguments, by name: shapes, dtypes and devices per call, contents once per list.

Checks per call read nothing from the device, so a CUDA call never waits. What is inside lists is
checked where lists are made, by `validate_lists`. All errors are ValueErrors that start with the
argument's name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import WORD, Partial, Pooled, to_blocks

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def validate_lists(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
) -> None:
    """Raises ValueError unless the lists are valid for these lengths; reads them: call it once.

    Checked: counts within [0, KB]; used ids within [0, ceil(n_k / block_k)) and strictly ascending;
    the same for ``partial``, whose mask ids must be rows of its table and whose ids must not be on
    the first list as well; lengths within [0, block_k].
    """
    check_lists(kv_num_blocks, kv_indices, n_q, n_k, block_q, block_k)
    key_blocks = -(-n_k // block_k)
    _check_entries("kv_num_blocks", kv_num_blocks, "kv_indices", kv_indices, n_k, block_k)
    if partial is not None:
        _check_partial(partial, n_q, n_k, block_q, block_k)
        counts, ids, mask_ids, masks = partial
        _check_entries("partial.num_blocks", counts, "partial.indices", ids, n_k, block_k)
        used = torch.arange(ids.shape[-1], device=ids.device) < counts[..., None]
        low, high = _extremes(mask_ids[used])
        if low < 0 or high >= max(1, masks.shape[0]):
            raise ValueError(
                f"partial.mask_ids: must lie in [0, {masks.shape[0]}), the rows of partial.masks; "
                f"got {low} to {high}"
            )
        both = to_blocks(kv_num_blocks, kv_indices, key_blocks) & to_blocks(counts, ids, key_blocks)
        if bool(both.any()):
            raise ValueError(
                "partial.indices: a block must not be full and partial at once; it is at "
                f"[batch, head, query block, key block] = {both.nonzero()[0].tolist()}"
            )
    if block_lengths is not None:
        _check_lengths(block_lengths, n_k, block_k)
        low, high = _extremes(block_lengths)
        if low < 0 or high > block_k:
            raise ValueError(f"block_lengths: must lie in [0, {block_k}], got {low} to {high}")


def _check_entries(
    counts_name: str, counts: Tensor, ids_name: str, ids: Tensor, n_k: int, block_k: int
) -> None:
    width = ids.shape[-1]
    key_blocks = -(-n_k // block_k)
    low, high = _extremes(counts)
    if low < 0 or high > width:
        raise ValueError(
            f"{counts_name}: counts must lie in [0, {width}], the length of {ids_name}' last axis; "
            f"got {low} to {high}"
        )
    used = torch.arange(width, device=ids.device) < counts[..., None]
    low, high = _extremes(ids[used])
    if low < 0 or high >= key_blocks:
        raise ValueError(
            f"{ids_name}: ids must lie in [0, {key_blocks}) for {n_k} keys in blocks of {block_k}; "
            f"got {low} to {high}"
        )
    descends = (ids[..., 1:] <= ids[..., :-1]) & used[..., 1:]
    if bool(descends.any()):
        at = descends.nonzero()[0].tolist()
        raise ValueError(
            f"{ids_name}: the ids of a query block must be strictly ascending; "
            f"they are not at [batch, head, query block, entry] = {at}"
        )


def _extremes(x: Tensor) -> tuple[int, int]:
    return (int(x.min()), int(x.max())) if x.numel() else (0, 0)


def _check_int32(name: str, x: Tensor, axes: str) -> None:
    if x.dtype != torch.int32:
        raise ValueError(f"{name}: must be int32, got {x.dtype}")
    if x.ndim != axes.count(",") + 1:
        raise ValueError(f"{name}: must have axes {axes}, got shape {list(x.shape)}")


def check_lists(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
    names: tuple[str, str] = ("kv_num_blocks", "kv_indices"),
) -> None:
    """Shapes, dtypes and devices of one list for these lengths."""
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ValueError(f"{name}: must be positive, got {block}")
    counts, ids = names
    _check_int32(counts, kv_num_blocks, "[batch, head, query block]")
    _check_int32(ids, kv_indices, "[batch, head, query block, entry]")
    if kv_indices.shape[:3] != kv_num_blocks.shape:
        raise ValueError(
            f"{ids}: its first three axes must equal {counts}' shape "
            f"{list(kv_num_blocks.shape)}, got {list(kv_indices.shape)}"
        )
    if kv_indices.device != kv_num_blocks.device:
        raise ValueError(
            f"{ids}: must be on {counts}' device {kv_num_blocks.device}, got {kv_indices.device}"
        )
    query_blocks, key_blocks = -(-n_q // block_q), -(-n_k // block_k)
    if kv_num_blocks.shape[2] != query_blocks:
        raise ValueError(
            f"{counts}: {n_q} queries in blocks of {block_q} need {query_blocks} query "
            f"blocks, the lists have {kv_num_blocks.shape[2]}; were they made for another length?"
        )
    if kv_indices.shape[3] > key_blocks:
        raise ValueError(
            f"{ids}: {n_k} keys in blocks of {block_k} are {key_blocks} key blocks, "
            f"the lists have room for {kv_indices.shape[3]}; were they made for another length?"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of the operands."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: must be [batch, head, token, channel], got {list(x.shape)}")
        if x.dtype not in (*FLOAT_DTYPES, torch.float64):
            raise ValueError(
                f"{name}: must be float16, bfloat16, float32 or float64, got {x.dtype}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: must have q's dtype {q.dtype}, got {x.dtype}")
        _check_device(name, x, q)
        if x.shape[2] == 0:
            raise ValueError(f"{name}: must have at least one token, got {list(x.shape)}")
    expected = [q.shape[0], q.shape[1], k.shape[2], q.shape[3]]
    for name, x in (("k", k), ("v", v)):
        if list(x.shape) != expected:
            raise ValueError(
                f"{name}: must have q's batch, heads and channels and k's tokens, {expected}; "
                f"got {list(x.shape)}"
            )


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: must be on q's device {q.device}, got {x.device}")


def check_broadcast(name: str, x: Tensor, q: Tensor) -> None:
    """The first two axes of a list-like tensor are 1 or q's, on q's device."""
    for axis, axis_name in ((0, "batch"), (1, "head")):
        if x.shape[axis] not in (1, q.shape[axis]):
            raise ValueError(
                f"{name}: its {axis_name} axis must be 1 or {q.shape[axis]}, got {x.shape[axis]}"
            )
    _check_device(name, x, q)


def _check_partial(partial: Partial, n_q: int, n_k: int, block_q: int, block_k: int) -> None:
    names = ("partial.num_blocks", "partial.indices")
    check_lists(partial.num_blocks, partial.indices, n_q, n_k, block_q, block_k, names)
    _check_int32("partial.mask_ids", partial.mask_ids, "[batch, head, query block, entry]")
    if partial.mask_ids.shape != partial.indices.shape:
        raise ValueError(
            f"partial.mask_ids: must have partial.indices' shape {list(partial.indices.shape)}, "
            f"got {list(partial.mask_ids.shape)}"
        )
    _check_int32("partial.masks", partial.masks, "[mask, query row, word]")
    expected = [block_q, -(-block_k // WORD)]
    if list(partial.masks.shape[1:]) != expected:
        raise ValueError(
            f"partial.masks: a {block_q} x {block_k} block takes {expected} words, "
            f"got {list(partial.masks.shape[1:])}"
        )


def _check_lengths(block_lengths: Tensor, n_k: int, block_k: int) -> None:
    _check_int32("block_lengths", block_lengths, "[key block]")
    key_blocks = -(-n_k // block_k)
    if block_lengths.shape[0] != key_blocks:
        raise ValueError(
            f"block_lengths: {n_k} keys in blocks of {block_k} are {key_blocks} key blocks, "
            f"got {block_lengths.shape[0]}; were they made for another length?"
        )


def _check_bias(name: str, bias: Tensor, q: Tensor, n: int) -> None:
    if bias.ndim != 3 or bias.shape[2] != n:
        raise ValueError(f"{name}: must be [batch, head, {n}], got {list(bias.shape)}")
    if bias.dtype != torch.float32:
        raise ValueError(f"{name}: must be float32, got {bias.dtype}")
    if bias.requires_grad:
        raise ValueError(f"{name}: has no gradient; detach it")
    check_broadcast(name, bias, q)


def check_options(
    q: Tensor,
    n_k: int,
    block_q: int,
    block_k: int,
    partial: Partial | None,
    block_lengths: Tensor | None,
    key_bias: Tensor | None,
    pooled: Pooled | None,
) -> None:
    """Shapes, dtypes and devices of everything optional."""
    n_q = q.shape[2]
    if partial is not None:
        _check_partial(partial, n_q, n_k, block_q, block_k)
        for name in ("num_blocks", "mask_ids"):
            check_broadcast(f"partial.{name}", getattr(partial, name), q)
        _check_device("partial.masks", partial.masks, q)
    if block_lengths is not None:
        _check_lengths(block_lengths, n_k, block_k)
        _check_device("block_lengths", block_lengths, q)
    if key_bias is not None:
        _check_bias("key_bias", key_bias, q, n_k)
    if pooled is not None:
        _check_pooled(pooled, q, -(-n_q // block_q))


def _check_pooled(pooled: Pooled, q: Tensor, query_blocks: int) -> None:
    for name, x in (("pooled.k", pooled.k), ("pooled.v", pooled.v)):
        expected = [q.shape[0], q.shape[1], pooled.k.shape[2], q.shape[3]]
        if list(x.shape) != expected:
            raise ValueError(f"{name}: must be {expected}, got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: must have q's dtype {q.dtype}, got {x.dtype}")
        _check_device(name, x, q)
    tokens = pooled.k.shape[2]
    _check_bias("pooled.bias", pooled.bias, q, tokens)
    _check_int32("pooled.bits", pooled.bits, "[batch, head, query block, word]")
    if list(pooled.bits.shape[2:]) != [query_blocks, -(-tokens // WORD)]:
        raise ValueError(
            f"pooled.bits: {query_blocks} query blocks and {tokens} pooled tokens take "
            f"{[query_blocks, -(-tokens // WORD)]} words, got {list(pooled.bits.shape[2:])}"
        )
    check_broadcast("pooled.bits", pooled.bits, q)
