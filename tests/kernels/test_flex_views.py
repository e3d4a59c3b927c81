"""FlexAttention's C++ template reads a view from the start of its buffer; our wrapper must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import flex, reference

HEADS, TOKENS, D, BLOCK = 2, 128, 16, 16
Operands = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def split_columns(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as column ranges of one product; q and k changed since, as RoPE does."""
    parts = torch.nn.functional.linear(x, weight).split(HEADS * D, -1)
    q, k, v = (part.unflatten(2, (HEADS, D)).transpose(1, 2) for part in parts)
    return q * 1.5, k * 1.5, v


def unbound_planes(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as dense planes of one buffer, at an offset each."""
    product = torch.nn.functional.linear(x, weight).unflatten(2, (3, HEADS, D))
    q, k, v = product.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return q, k * 1.5, v


@pytest.mark.parametrize("operands", [split_columns, unbound_planes])
def test_flex_reads_views_of_one_product_where_they_lie(operands: Operands) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, 24, generator=generator)
    weight = torch.randn(3 * HEADS * D, 24, generator=generator) / 5
    blocks = TOKENS // BLOCK
    counts = torch.full((1, HEADS, blocks), blocks, dtype=torch.int32)
    ids = torch.arange(blocks, dtype=torch.int32).expand(1, HEADS, blocks, blocks).contiguous()

    def attend(x: Tensor, weight: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        q, k, v = operands(x, weight)
        return flex.block_sparse_attention(q, k, v, counts, ids, BLOCK, BLOCK, D**-0.5)

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(attend, dynamic=False)(x, weight, counts, ids)
        doubles = operands(x.double(), weight.double())
        truth = reference.block_sparse_attention(*doubles, counts, ids, BLOCK, BLOCK, D**-0.5)
        plain = reference.block_sparse_attention(
            *operands(x, weight), counts, ids, BLOCK, BLOCK, D**-0.5
        )
    own_error = (plain.double() - truth).norm()
    # Twice the reference's own float32 error, and the rounding of the outputs themselves.
    budget = 2 * own_error + torch.finfo(torch.float32).eps * truth.norm()
    assert (got.double() - truth).norm() <= budget
