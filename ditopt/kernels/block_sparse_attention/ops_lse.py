"""``torch.ops.ditopt.block_sparse_attention_with_lse``: every option, log-sum-exp and gradients.

`ops` has the operator that passes write: lists of full blocks in, attention out. This one also
takes what `reference` calls optional, returns the natural-log LSE and can be differentiated; its
backward is an operator too, so both can stand in compiled graphs. CUDA runs `triton` and
`triton_backward` (forward without options: what `ops` runs), the CPU runs `cpu_native` forward.
The rest is `reference`, a loop in Python that is there to be right: backward on the CPU, float64,
and what `reason_to_decline_triton` and `cpu_native.reason_to_decline` say.

Outputs and gradients lie in memory as [B, N, H, D]; the LSE is contiguous, float32 (float64 for
float64). Options travel as ten tensors or None: an operator's schema has no tuples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu_native, reference
from .checks import FLOAT_DTYPES
from .lists import Partial, Pooled
from .ops import empty_output

_NAME = "ditopt::block_sparse_attention_with_lse"
_BACKWARD = "ditopt::block_sparse_attention_backward"
_LISTS = "Tensor kv_num_blocks, Tensor kv_indices, int block_q, int block_k, float scale"
_OPTIONS = ", ".join(
    f"Tensor? {name}=None"
    for name in (
        "partial_num_blocks", "partial_indices", "partial_mask_ids", "masks", "block_lengths",
        "key_bias", "pooled_k", "pooled_v", "pooled_bias", "pooled_bits",
    )
)  # fmt: skip
torch.library.define(
    _NAME, f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
torch.library.define(
    _BACKWARD,
    "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LISTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
MAX_HEAD_SIZE = 128
_INPUTS = 18  # of the forward operator
Flat = tuple[Tensor | None, ...]
Structured = tuple[Partial | None, Tensor | None, Tensor | None, Pooled | None]


def flatten(
    partial: Partial | None,
    block_lengths: Tensor | None,
    key_bias: Tensor | None,
    pooled: Pooled | None,
) -> Flat:
    """The operator's optional arguments."""
    return (*(partial or (None,) * 4), block_lengths, key_bias, *(pooled or (None,) * 4))


def structured(options: Flat) -> Structured:
    """`reference`'s optional arguments; the inverse of `flatten`."""
    filled = (*options, *(None,) * (10 - len(options)))
    partial = None if filled[0] is None else Partial(*filled[:4])  # type: ignore[arg-type]
    pooled = None if filled[6] is None else Pooled(*filled[6:])  # type: ignore[arg-type]
    return partial, filled[4], filled[5], pooled


def _gradient_like(x: Tensor) -> Tensor:
    """Uninitialised, shaped as x [B, H, N, D], in memory [B, N, H, D]."""
    return empty_output(x, x)


def _cpu(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if cpu_native.reason_to_decline(q) is not None:
        return _reference(q, k, v, *rest)
    out = empty_output(q, v)
    structured_args: Any = (*rest[:5], out, *structured(rest[5:]))
    lse = cpu_native.forward(q, k, v, *structured_args, return_lse=True)
    assert lse is not None
    return out, lse


def _reference(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    both: Any = (*rest[:5], *structured(rest[5:]))
    out, lse = reference.block_sparse_attention_with_lse(q, k, v, *both)
    return empty_output(q, v).copy_(out), lse


def reason_to_decline_triton(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why the Triton kernels cannot run a call, or None where they can."""
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


def _cuda(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if reason_to_decline_triton(q, *rest[2:4]):
        return _reference(q, k, v, *rest)
    from . import hopper, triton  # Triton is imported on the first launch only

    lists: Any = rest[:5]
    options: Any = rest[5:]
    plain = all(option is None for option in options)
    if plain and hopper.reason_to_decline(q, lists[2], lists[3]) is None:
        out, lse = hopper.forward(q, k, v, *lists, return_lse=True)
    else:
        both: Any = (*lists, *structured(options))
        out, lse = triton.forward(q, k, v, *both, return_lse=True)
    assert lse is not None
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_output(q, v), q.new_empty(q.shape[:3], dtype=accumulate)


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    structured_args: Any = (*args[:12], *structured(args[12:]))
    grads = reference.backward(*structured_args)
    q = args[2]
    return tuple(
        q.new_empty(0) if grad is None else _gradient_like(grad).copy_(grad) for grad in grads
    )


def _cuda_backward(*args: Any) -> tuple[Tensor, ...]:
    if reason_to_decline_triton(args[2], *args[9:11]):
        return _reference_backward(*args)
    from . import triton_backward

    structured_args: Any = (*args[:12], *structured(args[12:]))
    return triton_backward.backward(*structured_args)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    q, k, v = args[2:5]
    pooled = structured(args[12:])[3]
    extra = (pooled.k, pooled.v) if pooled else (None, None)
    return tuple(q.new_empty(0) if x is None else _gradient_like(x) for x in (q, k, v, *extra))


torch.library.impl(_NAME, "cpu", _cpu)
torch.library.impl(_NAME, "cuda", _cuda)
torch.library.register_fake(_NAME, _fake)
torch.library.impl(_BACKWARD, "cpu", _reference_backward)
torch.library.impl(_BACKWARD, "cuda", _cuda_backward)
torch.library.register_fake(_BACKWARD, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, counts, ids, *numbers = inputs[:8]
    ctx.numbers = numbers
    ctx.save_for_backward(q, k, v, *output, counts, ids, *inputs[8:])


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, counts, ids, *options = ctx.saved_tensors
    dq, dk, dv, pooled_k, pooled_v = torch.ops.ditopt.block_sparse_attention_backward.default(
        grad_out, grad_lse, q, k, v, out, lse, counts, ids, *ctx.numbers, *options
    )
    grads: list[Tensor | None] = [dq, dk, dv, *(None,) * (_INPUTS - 3)]
    if options and structured(tuple(options))[3] is not None:
        grads[14], grads[15] = pooled_k, pooled_v
    return tuple(grads)


torch.library.register_autograd(_NAME, _autograd, setup_context=_setup_context)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled: Pooled | None = None,
) -> tuple[Tensor, Tensor]:
    """The registered operator, typed: (out, LSE); arguments as in `reference`."""
    options = flatten(partial, block_lengths, key_bias, pooled)
    out, lse = torch.ops.ditopt.block_sparse_attention_with_lse.default(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale, *options
    )
    return out, lse
