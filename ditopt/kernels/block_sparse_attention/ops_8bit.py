"""Block-sparse attention with 8-bit matrix products: the public function and its operator.

``torch.ops.ditopt.block_sparse_attention_8bit``: a CPU runs `reference_8bit`, Hopper GPUs
`hopper_8bit`; others refuse, because 8 bits are asked for by name and nothing may stand in for
them. ``block_sparse_attention_8bit_simulated`` runs the reference on any device, for plans that
allow it. What the two arithmetics cost in accuracy: README.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference_8bit
from .checks import check_broadcast, check_lists, check_tensors
from .ops import empty_output

if TYPE_CHECKING:
    from .reference_8bit import Arithmetic

_NAME = "ditopt::block_sparse_attention_8bit"
_SIMULATED = "ditopt::block_sparse_attention_8bit_simulated"
for _name in (_NAME, _SIMULATED):
    torch.library.define(
        _name,
        "(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, "
        "int block_q, int block_k, float scale, bool values) -> Tensor",
    )


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    values: bool,
) -> Tensor:
    exact = reference_8bit.block_sparse_attention_8bit(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale, values=values
    )
    return empty_output(q, v).copy_(exact)


torch.library.impl(_NAME, "cpu", _reference)
torch.library.impl(_SIMULATED, ("cpu", "cuda"), _reference)


@torch.library.impl(_NAME, "cuda")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    values: bool,
) -> Tensor:
    from . import hopper_8bit  # needs Triton

    reason = reason_to_decline(q, block_q, block_k)
    if reason is not None:
        raise ValueError(f"q: {reason}")
    lists = (kv_num_blocks, kv_indices)
    return hopper_8bit.forward(q, k, v, *lists, block_q, block_k, scale, values=values)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    values: bool,
) -> Tensor:
    return empty_output(q, v)


for _name in (_NAME, _SIMULATED):
    torch.library.register_fake(_name, _fake)


def reason_to_decline(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why no 8-bit kernel can run a call on q's device, or None where one can."""
    if q.device.type != "cuda":
        return f"the 8-bit kernel is for compute capability 9.0, the device is {q.device.type}"
    from . import hopper_8bit  # needs Triton

    return hopper_8bit.reason_to_decline(q, block_q, block_k)


def block_sparse_attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    block_q: int,
    block_k: int,
    arithmetic: Arithmetic,
    scale: float | None = None,
) -> Tensor:
    """`api.block_sparse_attention` in 8 bits: Q K^T in int8, or that and P V in e4m3.

    Shapes and lists as there; see `reference_8bit` for what is computed. On Hopper: bfloat16 and
    float16, 64 and 128 channels, ``block_q`` a multiple of 128, ``block_k`` 64 or 128. No
    gradients. Raises ValueError that starts with the argument's name.
    """
    check_tensors(q, k, v)
    check_lists(kv_num_blocks, kv_indices, q.shape[2], k.shape[2], block_q, block_k)
    check_broadcast("kv_num_blocks", kv_num_blocks, q)
    if arithmetic not in ("int8_qk", "int8_qk_e4m3_pv"):
        raise ValueError(f"arithmetic: must be int8_qk or int8_qk_e4m3_pv, got {arithmetic!r}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: must be finite and positive, got {scale}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("q: 8-bit attention has no gradients; call it under torch.no_grad()")
    out: Tensor = torch.ops.ditopt.block_sparse_attention_8bit.default(
        q, k, v, kv_num_blocks, kv_indices, block_q, block_k, scale, arithmetic != "int8_qk"
    )
    return out
