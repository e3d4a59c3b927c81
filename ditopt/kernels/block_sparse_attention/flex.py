"""Block-sparse attention as FlexAttention's higher-order operator, for graphs that Inductor lowers.

`block_sparse_attention` has the operator's signature and is plain traceable Python: put it into an
fx graph as a ``call_function`` target and give the graph to ``compile_fx`` (or ``torch.compile``).
Never run it eagerly: eager FlexAttention ignores the lists and computes dense attention, so an
eager call is refused.

The lists are ordinary graph inputs: another pattern of the same list shape runs the same program
(pad lists to the full width ceil(N_k / block_k) to share one program over densities; a narrower
list is padded in the graph). Kept blocks are full blocks, without score or mask code in the inner
loop; tokens at or beyond N_k are masked by the template's own tail handling. Ids and counts are
clamped, so that a wrong list can give wrong numbers but never an access outside the tensors.

dtype: CPU float32, bfloat16, float16; CUDA the same; accumulation float32. The output's strides
follow q's. Cost: 4 D FLOPs per kept (query, key) pair. Source: attention.md section 4.24; the
templates are ``torch/_inductor/codegen/cpp_flex_attention_template.py`` and ``kernel/flex`` (torch
2.11, 2.13).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

_CUDA_OPTIONS: dict[str, bool | int] = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}


def _identity(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    return score


def _everything(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    return b.new_ones(size=(), dtype=torch.bool)


def reason_to_decline(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why FlexAttention cannot lower this call, or None where it can."""
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return f"FlexAttention is used on cpu and cuda only, q is on {device}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"FlexAttention takes float32, float16 and bfloat16, q is {q.dtype}"
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if device == "cuda" and (block < 16 or block & (block - 1)):
            return f"FlexAttention on cuda takes powers of two from 16 as {name}, got {block}"
    if device == "cuda" and q.shape[-1] < 16:
        return f"FlexAttention on cuda needs a head size of at least 16, got {q.shape[-1]}"
    return None


def _own_storage(x: Tensor) -> Tensor:
    """`x`, copied where it is a part of another tensor.

    The C++ template reads such a view from the start of its buffer (torch 2.11 to 2.13): with q, k
    and v split from one matrix product, and only some of them changed since, results are wrong.
    Dynamo cannot trace a storage offset and gets the copy always; ``compile_fx`` only where needed.
    """
    whole = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    if whole and not torch.compiler.is_dynamo_compiling() and x.storage_offset() == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """Attention output [B, H, N_q, D] in q's dtype; arguments as in `reference`."""
    key_blocks = (k.shape[2] + block_k - 1) // block_k
    counts = kv_num_blocks.clamp(0, kv_indices.shape[-1]).contiguous()
    lists = kv_indices.clamp(min=0).clamp(max=key_blocks - 1)
    if lists.shape[-1] < key_blocks:
        lists = torch.nn.functional.pad(lists, (0, key_blocks - lists.shape[-1]))
    lists = lists.contiguous()
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        q, k, v = (_own_storage(x) for x in (q, k, v))
    # Under SKIP_MASK_SCORE the C++ template runs neither score nor mask code and clips the last
    # block itself: its "partial" lists are then our full blocks. The Triton template has two loops.
    mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        kv_num_blocks=counts if on_cpu else torch.zeros_like(counts),
        kv_indices=lists,
        full_kv_num_blocks=None if on_cpu else counts,
        full_kv_indices=None if on_cpu else lists,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=_everything,
    )
    options: dict[str, bool | int] = {"SKIP_MASK_SCORE": True, "OUTPUT_LOGSUMEXP": False}
    if not on_cpu:
        options = dict(_CUDA_OPTIONS)
        if min(block_q, block_k) < 128:  # Inductor's own tiles may be larger than the lists' blocks
            options |= {"BLOCK_M": min(block_q, 128), "BLOCK_N": min(block_k, 128)}
    out: Tensor = torch.ops.higher_order.flex_attention(
        q, k, v, _identity, mask.as_tuple(), scale, options
    )[0]
    return out
