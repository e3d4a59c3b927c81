"""Block-sparse attention on a CPU in one parallel region of compiled C++: `cpu_kernel.cpp`.

Shapes, lists and options as in `reference`, which this must equal; forward only. The source is
compiled on first use by the C++ compiler that Inductor uses, for this processor, and cached where
Inductor caches; `reason_to_decline` says why not where that fails.

dtype: float32 arithmetic; bfloat16 and float16 operands are converted before and results after.
Cost: 4 D FLOPs per kept (query, key) pair; keys and values are packed once (float32 copies).
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .lists import Partial, Pooled

FILE = Path(__file__).with_name("cpu_kernel.cpp")
_log = logging.getLogger("ditopt.kernels.block_sparse_attention")
_POINTERS = (
    "q", "k", "v", "out", "lse", "counts", "ids", "some_counts", "some_ids", "mask_ids", "masks",
    "lengths", "bias", "pooled_k", "pooled_v", "pooled_bias", "bits",
)  # fmt: skip
_STRIDES = {
    "q": 3, "k": 3, "v": 3, "out": 3, "pooled_k": 3, "pooled_v": 3, "counts": 3, "ids": 3,
    "some_counts": 3, "some_ids": 3, "bias": 2, "pooled_bias": 2, "bits": 3,
}  # fmt: skip
_SIZES = (
    "batch", "heads", "n_q", "n_k", "n_pooled", "d", "block_q", "block_k", "width", "some_width",
    "mask_count",
)  # fmt: skip


class _Call(ctypes.Structure):
    """``Call`` of the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_strides", ctypes.c_int64 * axes) for name, axes in _STRIDES.items()),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


@lru_cache(maxsize=1)
def _library() -> tuple[Any, str | None]:
    """The compiled function, or why there is none."""
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load(FILE.read_text(), extra_flags=("-ffp-contract=fast",))
    except Exception as error:
        reason = f"the C++ kernel did not compile: {type(error).__name__}: {error}"
        _log.warning("block_sparse_attention on cpu: %s", reason)
        return None, reason
    function = library.ditopt_block_sparse_attention
    function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    return function, None


def reason_to_decline(q: Tensor) -> str | None:
    """Why the C++ kernel cannot run this call, or None where it can; compiles on first use."""
    if q.device.type != "cpu":
        return f"the C++ kernel needs q on the CPU, got {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the C++ kernel takes float32, bfloat16 and float16, q is {q.dtype}"
    return _library()[1]


def _rows(x: Tensor) -> Tensor:
    """float32 with adjacent channels."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _listed(x: Tensor, batch: int, heads: int) -> Tensor:
    """A list-like tensor for all heads, by strides of 0; its last axis adjacent."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.expand(batch, heads, *x.shape[2:])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    out: Tensor,
    partial: Partial | None = None,
    block_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    pooled: Pooled | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | None:
    """Fills ``out`` [B, H, N_q, D] completely; returns the natural-log LSE [B, H, N_q] or None."""
    batch, heads, n_q, d = q.shape
    result = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if return_lse else None
    tensors: dict[str, Tensor] = {"q": _rows(q), "k": _rows(k), "v": _rows(v), "out": result}
    tensors |= {"counts": _listed(kv_num_blocks, batch, heads)}
    tensors |= {"ids": _listed(kv_indices, batch, heads)}
    if partial is not None:
        some_ids, mask_ids = (x.contiguous() for x in (partial.indices, partial.mask_ids))
        tensors |= {"some_counts": _listed(partial.num_blocks, batch, heads)}
        tensors |= {
            "some_ids": _listed(some_ids, batch, heads),
            "masks": partial.masks.contiguous(),
        }
        tensors |= {"mask_ids": _listed(mask_ids, batch, heads)}
    if block_lengths is not None:
        tensors["lengths"] = block_lengths.contiguous()
    lowest = torch.finfo(torch.float32).min
    if key_bias is not None:
        tensors["bias"] = _listed(key_bias.clamp(min=lowest / 2), batch, heads)
    if pooled is not None:
        tensors |= {"pooled_k": _rows(pooled.k), "pooled_v": _rows(pooled.v)}
        tensors["pooled_bias"] = _listed(pooled.bias.clamp(min=lowest / 2), batch, heads)
        tensors["bits"] = _listed(pooled.bits, batch, heads)
    if lse is not None:
        tensors["lse"] = lse
    call = _Call(
        batch=batch, heads=heads, n_q=n_q, n_k=k.shape[2], d=d, block_q=block_q, block_k=block_k,
        n_pooled=0 if pooled is None else pooled.k.shape[2], width=kv_indices.shape[-1],
        some_width=0 if partial is None else partial.indices.shape[-1],
        mask_count=0 if partial is None else partial.masks.shape[0],
        scale=scale, threads=torch.get_num_threads(),
    )  # fmt: skip
    for name, x in tensors.items():
        setattr(call, name, x.data_ptr())
        if name in _STRIDES:
            strides = x.stride()[: _STRIDES[name]]
            setattr(call, f"{name}_strides", (ctypes.c_int64 * _STRIDES[name])(*strides))
    _library()[0](ctypes.byref(call))
    if result is not out:
        out.copy_(result)
    return lse
