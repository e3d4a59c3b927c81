"""What makes a functional ATen graph valid ONNX, applied while the graph is run once more.

| in the graph | why not in ONNX | instead |
|---|---|---|
| complex numbers (RoPE as `view_as_complex`) | no complex operators | pairs of real tensors |
| `squeeze(dim)` of an axis longer than 1 | the operator forbids it | nothing: it does nothing |
| masks [B, 1, 1, K] of attention | onnxruntime wants a row per query | expanded |
| attention to no key at all | onnxruntime refuses it | zeros |
| `where` of truth values | onnxruntime has no such kernel | and, or, not |
| block-sparse attention | an operator of ditopt's own | attention under the lists' mask |
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.errors import EngineError

aten = torch.ops.aten

MAX_MASK_ELEMENTS = 1 << 28
"""Of a mask that stands for block lists: a quarter of a gigabyte of truth values."""


@dataclass(frozen=True)
class Pair:
    """A complex tensor as two real ones of the same shape."""

    re: Tensor
    im: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """`function` of both."""
        return Pair(function(self.re), function(self.im))

    @property
    def shape(self) -> torch.Size:
        """The tensor's sizes."""
        return self.re.shape


def _multiply(a: Any, b: Any) -> Any:
    if isinstance(a, Pair) and isinstance(b, Pair):
        return Pair(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re)
    pair, real = (a, b) if isinstance(a, Pair) else (b, a)
    return pair.each(lambda part: part * real)


def _add(a: Any, b: Any) -> Any:
    return Pair(a.re + b.re, a.im + b.im)


def _cat(parts: Any, dim: int = 0) -> Any:
    return Pair(torch.cat([p.re for p in parts], dim), torch.cat([p.im for p in parts], dim))


def _pad_sequence(parts: Any, batch_first: bool = False, value: float = 0.0, *_: Any) -> Any:
    re = torch.nn.utils.rnn.pad_sequence([p.re for p in parts], batch_first, value)
    return Pair(re, torch.nn.utils.rnn.pad_sequence([p.im for p in parts], batch_first))


def _parts_of(split: Any) -> Callable[..., list[Pair]]:
    """A function that cuts both parts alike."""

    def cut(z: Pair, *args: Any, **kwargs: Any) -> list[Pair]:
        both = (split(z.re, *args, **kwargs), split(z.im, *args, **kwargs))
        return [Pair(re, im) for re, im in zip(*both, strict=True)]

    return cut


_COMPLEX: dict[Any, Callable[..., Any]] = {
    aten.view_as_complex.default: lambda x: Pair(x[..., 0], x[..., 1]),
    aten.view_as_real.default: lambda z: torch.stack([z.re, z.im], -1),
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _add,
    aten.cat.default: _cat,
    aten.polar.default: lambda r, a: Pair(r * torch.cos(a), r * torch.sin(a)),
    aten.conj.default: lambda z: Pair(z.re, -z.im),
    aten.real.default: lambda z: z.re,
    aten.imag.default: lambda z: z.im,
    aten._to_copy.default: lambda z, **_: z,
    aten.to.dtype: lambda z, *_: z,
    aten.split_with_sizes.default: _parts_of(aten.split_with_sizes.default),
    aten.split.Tensor: _parts_of(aten.split.Tensor),
    aten.unbind.int: _parts_of(aten.unbind.int),
    aten.pad_sequence.default: _pad_sequence,
    operator.getitem: operator.getitem,
}
"""How operators on complex numbers go, written with pairs."""

_SHAPES = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.slice.Tensor,
    aten.select.int, aten.permute.default, aten.transpose.int, aten.expand.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.index.Tensor,
    aten.index_select.default, aten.flatten.using_ints, aten.unflatten.int, aten.repeat.default,
    aten.contiguous.default, aten.squeeze.dim, aten.lift_fresh_copy.default, aten.stack.default,
}  # fmt: skip
"""Operators that move elements: the same for both parts."""


class Rewriting(fx.Interpreter):
    """Runs a graph with the table above; trace it to get the rewritten graph.

    Args:
        gm: functional ATen; its complex attributes are replaced by pairs beforehand.
        pairs: real and imaginary part of each complex attribute.
    """

    def __init__(self, gm: fx.GraphModule, pairs: Mapping[str, Pair]) -> None:
        super().__init__(gm)
        self._pairs = pairs

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An attribute, complex ones as pairs."""
        if target in self._pairs:
            return self._pairs[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operator, or what stands for it."""
        if target is aten.view_as_complex.default or _has_pair(args):
            return self._complex(target, args, kwargs)
        if target is aten.polar.default:
            return _COMPLEX[target](*args)
        if target is aten.squeeze.dim and args[0].shape[args[1]] != 1:
            return args[0]
        if target is aten.scaled_dot_product_attention.default:
            return _attention(*args, **kwargs)
        if target is aten.where.self and args[1].dtype == torch.bool:
            condition, yes, no = args
            return (condition & yes) | (~condition & no)
        if target is aten.masked_fill.Scalar and args[0].dtype == torch.bool:
            x, mask, value = args
            return x | mask if value else x & ~mask
        if str(target) == "ditopt.block_sparse_attention.default":
            return _sparse_attention(*args, **kwargs)
        if str(target).startswith("ditopt."):
            raise EngineError(
                f"the operator {target} has no counterpart in ONNX",
                remedy="Leave it out of the plan, or export to pt2.",
            )
        return super().call_function(target, args, kwargs)

    def _complex(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _COMPLEX:
            return _COMPLEX[target](*args, **kwargs)
        if target in _SHAPES and isinstance(args[0], Pair):
            return args[0].each(lambda part: target(part, *args[1:], **kwargs))
        raise EngineError(f"the operator {target} on complex numbers has no counterpart in ONNX")


def _has_pair(args: Any) -> bool:
    if isinstance(args, tuple | list):
        return any(map(_has_pair, args))
    return isinstance(args, Pair)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """The same with a mask row for each query; without any key it is zeros, as in PyTorch."""
    if k.shape[-2] == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    if attn_mask is not None and attn_mask.shape[-2] != q.shape[-2]:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], q.shape[-2], k.shape[-2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, *rest, **options)


def _sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, ids: Tensor,
    block_q: int, block_k: int, scale: float,
) -> Tensor:  # fmt: skip
    """Dense attention under a mask: exact, as slow as dense, and in every runtime.

    A query block without a key block gives zeros.
    """
    n_q, n_k, key_blocks = q.shape[2], k.shape[2], -(-k.shape[2] // block_k)
    if counts.shape[1] * n_q * n_k > MAX_MASK_ELEMENTS:
        raise EngineError(
            f"a mask of {counts.shape[1]} x {n_q} x {n_k} stands for block lists in ONNX",
            remedy="Export to pt2, which computes the kept blocks only.",
        )
    entries = torch.arange(ids.shape[-1], device=ids.device)
    # Entries past the count point to a block behind the last one.
    known = torch.where(entries < counts[..., None], ids, key_blocks)
    blocks = torch.arange(key_blocks, device=ids.device, dtype=ids.dtype)
    kept = (known[..., None] == blocks).to(torch.int32).amax(-2) > 0  # [B, H, QB, KB]
    kept = kept.repeat_interleave(block_q, -2)[..., :n_q, :]
    kept = kept.repeat_interleave(block_k, -1)[..., :n_k]
    some = kept.to(torch.int32).amax(-1, keepdim=True) > 0
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, kept | ~some, scale=scale)
    return out * some.to(out.dtype)
