"""The public function: checks its arguments by name, picks an implementation, calls it.

Per-call checks read shapes, dtypes and devices only, so a CUDA call never waits for the GPU. What
is inside the lists is checked where lists are made, by `validate_lists`, once per list. The kernels
guard themselves all the same: no id reads outside the tensors.
"""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from . import ops, reference

Impl = Literal["auto", "reference", "triton", "cpu"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 128
_log = logging.getLogger("ditopt.kernels.block_sparse_attention")
_reported: set[tuple[str, str]] = set()


def validate_lists(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    n_q: int,
    n_k: int,
    block_q: int,
    block_k: int,
) -> None:
    """Raises ValueError unless the lists are valid for these lengths; reads them: call it once.

    Checked: counts within [0, KB]; used ids within [0, ceil(n_k / block_k)) and strictly ascending.
    """
    _check_list_shapes(kv_num_blocks, kv_indices, n_q, n_k, block_q, block_k)
    width = kv_indices.shape[-1]
    key_blocks = -(-n_k // block_k)
    low, high = _extremes(kv_num_blocks)
    if low < 0 or high > width:
        raise ValueError(
            f"kv_num_blocks: counts must lie in [0, {width}], the length of kv_indices' last axis; "
            f"got {low} to {high}"
        )
    used = torch.arange(width, device=kv_indices.device) < kv_num_blocks[..., None]
    low, high = _extremes(kv_indices[used])
    if low < 0 or high >= key_blocks:
        raise ValueError(
            f"kv_indices: ids must lie in [0, {key_blocks}) for {n_k} keys in blocks of {block_k}; "
            f"got {low} to {high}"
        )
    descends = (kv_indices[..., 1:] <= kv_indices[..., :-1]) & used[..., 1:]
    if bool(descends.any()):
        at = tuple(descends.nonzero()[0].tolist())
        raise ValueError(
            "kv_indices: the ids of a query block must be strictly ascending; "
            f"they are not at [batch, head, query block, entry] = {list(at)}"
        )


def _extremes(x: Tensor) -> tuple[int, int]:
    return (int(x.min()), int(x.max())) if x.numel() else (0, 0)


def _check_list_shapes(
    kv_num_blocks: Tensor, kv_indices: Tensor, n_q: int, n_k: int, block_q: int, block_k: int
) -> None:
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ValueError(f"{name}: must be positive, got {block}")
    for name, lists, axes in (
        ("kv_num_blocks", kv_num_blocks, "[batch, head, query block]"),
        ("kv_indices", kv_indices, "[batch, head, query block, entry]"),
    ):
        if lists.dtype != torch.int32:
            raise ValueError(f"{name}: must be int32, got {lists.dtype}")
        if lists.ndim != axes.count(",") + 1:
            raise ValueError(f"{name}: must have axes {axes}, got shape {list(lists.shape)}")
    if kv_indices.shape[:3] != kv_num_blocks.shape:
        raise ValueError(
            "kv_indices: its first three axes must equal kv_num_blocks' shape "
            f"{list(kv_num_blocks.shape)}, got {list(kv_indices.shape)}"
        )
    if kv_indices.device != kv_num_blocks.device:
        raise ValueError(
            f"kv_indices: must be on kv_num_blocks' device {kv_num_blocks.device}, "
            f"got {kv_indices.device}"
        )
    query_blocks, key_blocks = -(-n_q // block_q), -(-n_k // block_k)
    if kv_num_blocks.shape[2] != query_blocks:
        raise ValueError(
            f"kv_num_blocks: {n_q} queries in blocks of {block_q} need {query_blocks} query "
            f"blocks, the lists have {kv_num_blocks.shape[2]}; were they made for another length?"
        )
    if kv_indices.shape[3] > key_blocks:
        raise ValueError(
            f"kv_indices: {n_k} keys in blocks of {block_k} are {key_blocks} key blocks, "
            f"the lists have room for {kv_indices.shape[3]}; were they made for another length?"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: must be [batch, head, token, channel], got {list(x.shape)}")
        if x.dtype not in (*FLOAT_DTYPES, torch.float64):
            raise ValueError(
                f"{name}: must be float16, bfloat16, float32 or float64, got {x.dtype}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: must be on q's device {q.device}, got {x.device}")
        if x.shape[2] == 0:
            raise ValueError(f"{name}: must have at least one token, got {list(x.shape)}")
    expected = [q.shape[0], q.shape[1], k.shape[2], q.shape[3]]
    for name, x in (("k", k), ("v", v)):
        if list(x.shape) != expected:
            raise ValueError(
                f"{name}: must have q's batch, heads and channels and k's tokens, {expected}; "
                f"got {list(x.shape)}"
            )


def reason_to_decline_triton(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why the Triton kernel cannot run this call, or None where it can."""
    if q.device.type != "cuda":
        return f"needs q on a CUDA device, got {q.device}"
    if q.dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, q is {q.dtype}"
    if q.shape[3] % 8 or not 16 <= q.shape[3] <= MAX_HEAD_SIZE:
        return f"takes 16 to {MAX_HEAD_SIZE} channels in multiples of 8, got {q.shape[3]}"
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 16 or block & (block - 1):
            return f"takes powers of two of at least 16 as {name}, got {block}"
    return None


def _choose(q: Tensor, needs_grad: bool, block_q: int, block_k: int, impl: Impl) -> str:
    """The implementation to run; an explicit one that cannot run is an error, never replaced."""
    if impl not in ("auto", "reference", "triton", "cpu"):
        raise ValueError(f"impl: must be auto, reference, triton or cpu, got {impl!r}")
    if impl == "reference":
        return impl
    reasons = {
        "cpu": None if q.device.type == "cpu" else f"needs q on the CPU, got {q.device}",
        "triton": reason_to_decline_triton(q, block_q, block_k),
    }
    if needs_grad:
        reasons = dict.fromkeys(reasons, "has no backward yet; use impl='reference' for gradients")
    if impl == "auto":
        return next((name for name, reason in reasons.items() if reason is None), "reference")
    if reasons[impl] is not None:
        raise ValueError(f"impl: {impl!r} {reasons[impl]}")
    return impl


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax attention of each query block over the key blocks on its list.

    q [B, H, N_q, D]; k, v [B, H, N_k, D], one dtype, any strides. kv_num_blocks int32 [Bl, Hl, QB]
    and kv_indices int32 [Bl, Hl, QB, KB] with Bl in {1, B}, Hl in {1, H}: see `reference`.
    ``scale`` defaults to D ** -0.5. Returns [B, H, N_q, D] in q's dtype; accumulation is float32
    (float64 for float64). Cost: 4 D FLOPs per kept (query, key) pair. Raises ValueError that starts
    with the argument's name.
    """
    _check_tensors(q, k, v)
    _check_list_shapes(kv_num_blocks, kv_indices, q.shape[2], k.shape[2], block_q, block_k)
    for axis, name in ((0, "batch"), (1, "head")):
        if kv_num_blocks.shape[axis] not in (1, q.shape[axis]):
            raise ValueError(
                f"kv_num_blocks: its {name} axis must be 1 or {q.shape[axis]}, "
                f"got {kv_num_blocks.shape[axis]}"
            )
    if kv_num_blocks.device != q.device:
        raise ValueError(
            f"kv_num_blocks: must be on q's device {q.device}, got {kv_num_blocks.device}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale: must be finite, got {scale}")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    chosen = _choose(q, needs_grad, block_q, block_k, impl)
    if impl == "auto" and (q.device.type, chosen) not in _reported:
        _reported.add((q.device.type, chosen))
        _log.info("block_sparse_attention on %s in %s: %s", q.device, q.dtype, chosen)
    if chosen == "reference":
        return reference.block_sparse_attention(
            q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale
        )
    return ops.call(q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale)
