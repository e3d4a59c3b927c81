"""The public functions: check their arguments by name, pick an implementation, call it.

Per-call checks read shapes, dtypes and devices only, so a CUDA call never waits for the GPU. What
is inside the lists is checked where lists are made, by `validate_lists`, once per list. The kernels
guard themselves all the same: no id reads outside the tensors. Calls with gradients, a log-sum-exp
or options are `ops_lse`'s operator, all others `ops`'s.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from . import ops, ops_lse, pooling, reference
from .checks import check_broadcast, check_lists, check_options, check_tensors
from .checks import validate_lists as validate_lists
from .ops_lse import reason_to_decline_triton

if TYPE_CHECKING:
    from .lists import Partial, Pooled

Impl = Literal["auto", "reference", "triton", "cpu"]
Dropped = Literal["drop", "mean"]


class Options(TypedDict, total=False):
    """What both functions also take; shapes in `reference` and `lists`.

    ``partial`` is a second list, of blocks with masks; ``block_lengths`` how many tokens of each
    key block exist; ``key_bias`` is added to the scores of keys; ``pooled`` are weighted tokens
    beside the keys. ``dropped`` says what becomes of blocks on no list: "drop" forgets them, "mean"
    lets their mean stand for each (`pooling.mean_substitute`, computed in this call).
    """

    partial: Partial | None
    block_lengths: Tensor | None
    key_bias: Tensor | None
    pooled: Pooled | None
    dropped: Dropped


_log = logging.getLogger("ditopt.kernels.block_sparse_attention")
_reported: set[tuple[str, str]] = set()


def _choose(q: Tensor, needs_grad: bool, block_q: int, block_k: int, impl: Impl) -> tuple[str, str]:
    """(the implementation to run, why not a faster one); an explicit one is never replaced."""
    if impl not in ("auto", "reference", "triton", "cpu"):
        raise ValueError(f"impl: must be auto, reference, triton or cpu, got {impl!r}")
    if impl == "reference":
        return impl, ""
    on_cpu = None if q.device.type == "cpu" else f"needs q on the CPU, got {q.device}"
    if on_cpu is None and needs_grad:
        on_cpu = "has no backward; use impl='reference' for gradients"
    reasons = {"cpu": on_cpu, "triton": reason_to_decline_triton(q, block_q, block_k)}
    if impl == "auto":
        fitting = next((name for name, reason in reasons.items() if reason is None), None)
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        return (fitting, "") if fitting else ("reference", why)
    if reasons[impl] is not None:
        raise ValueError(f"impl: {impl!r} {reasons[impl]}")
    return impl, ""


def block_sparse_attention_with_lse(
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
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` and its natural-log log-sum-exp [B, H, N_q].

    The log-sum-exp is float32 (float64 for float64), -inf for rows that see nothing, and can be
    differentiated. Two results over different keys of one query merge by it (attention.md A9).
    """
    return _run(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale, impl, options, need_lse=True
    )


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
    **options: Unpack[Options],
) -> Tensor:
    """Softmax attention of each query block over the key blocks on its list.

    q [B, H, N_q, D]; k, v [B, H, N_k, D], one dtype, any strides. kv_num_blocks int32 [Bl, Hl, QB]
    and kv_indices int32 [Bl, Hl, QB, KB] with Bl in {1, B}, Hl in {1, H}: see `reference`.
    ``scale`` defaults to D ** -0.5; for ``options`` see `Options`. Returns [B, H, N_q, D] in q's
    dtype; accumulation is float32 (float64 for float64). Differentiable in q, k, v and pooled
    tokens. Cost: 4 D FLOPs per kept (query, key) pair. Raises ValueError that starts with the
    argument's name.
    """
    return _run(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale, impl, options, need_lse=False
    )[0]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float | None,
    impl: Impl,
    options: Options,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    check_tensors(q, k, v)
    check_lists(kv_num_blocks, kv_indices, q.shape[2], k.shape[2], block_q, block_k)
    check_broadcast("kv_num_blocks", kv_num_blocks, q)
    partial, lengths = options.get("partial"), options.get("block_lengths")
    key_bias, pooled = options.get("key_bias"), options.get("pooled")
    check_options(q, k.shape[2], block_q, block_k, partial, lengths, key_bias, pooled)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale: must be finite, got {scale}")
    if scale < 0:  # the kernels take the maximum of scores before they scale them
        q, scale = -q, -scale
    if _substitutes(options):
        pooled = pooling.mean_substitute(k, v, kv_num_blocks, kv_indices, block_k, partial, lengths)
    flags = (partial, lengths, key_bias, pooled)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    extended = need_lse or needs_grad or any(option is not None for option in flags)
    chosen, why = _choose(q, needs_grad, block_q, block_k, impl)
    if impl == "auto" and not torch.compiler.is_compiling():  # Dynamo traces no logging
        _report(q, chosen, why)
    lists = (kv_num_blocks, kv_indices, block_q, block_k, scale)
    if impl == "reference" or q.device.type not in ("cpu", "cuda"):
        return reference.block_sparse_attention_with_lse(q, k, v, *lists, *flags)
    if extended or chosen == "reference":
        return ops_lse.call(q, k, v, *lists, *flags)
    return ops.call(q, k, v, *lists), q.new_empty(0)


def _report(q: Tensor, chosen: str, why: str) -> None:
    """Says once for each device what runs there, and why nothing faster does."""
    if (q.device.type, chosen) not in _reported:
        _reported.add((q.device.type, chosen))
        why = f" ({why})" if why else ""
        _log.info("block_sparse_attention on %s in %s: %s%s", q.device, q.dtype, chosen, why)


def _substitutes(options: Options) -> bool:
    """Whether means of dropped blocks are asked for and can be had."""
    dropped = options.get("dropped", "drop")
    if dropped not in ("drop", "mean"):
        raise ValueError(f"dropped: must be drop or mean, got {dropped!r}")
    if dropped == "mean":
        for name in ("pooled", "key_bias"):
            if options.get(name) is not None:
                raise ValueError(f"dropped: the means know no {name}; pass one of the two")
    return dropped == "mean"
