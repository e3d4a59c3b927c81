"""The linear remainder: the blockwise operator against the pairwise reference, and SLA's limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention.lists import from_blocks, to_blocks
from ditopt.kernels.linear_attention import ops, reference

SHAPES = [  # batch, heads, n_q, n_k, head size, block_q, block_k
    (1, 1, 1, 1, 4, 8, 8),
    (2, 3, 63, 63, 8, 16, 16),
    (1, 2, 100, 40, 12, 32, 8),
]


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    batch, heads, n_q, n_k, d, block_q, block_k = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, heads, d, dtype=dtype).transpose(1, 2) for n in (n_q, n_k, n_k)
    )
    keep = torch.rand(1, heads, -(-n_q // block_q), -(-n_k // block_k)) < 0.4
    keep.flatten(0, 2)[0] = True  # a row that leaves nothing
    return q, k, v, *from_blocks(keep), block_q, block_k


@pytest.mark.parametrize("phi", reference.FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operator_equals_the_reference(shape: tuple[int, ...], phi: str) -> None:
    args = case(shape)
    out = torch.ops.ditopt.linear_remainder.default(*args, phi)
    torch.testing.assert_close(out, reference.remainder(*args, phi), rtol=0, atol=1e-12)
    low = case(shape, torch.bfloat16)
    low_out = torch.ops.ditopt.linear_remainder.default(*low, phi)
    exact = reference.remainder(*(x.double() for x in low[:3]), *low[3:], phi)
    own = (reference.remainder(*low, phi) - exact).norm() / exact.norm().clamp(min=1e-30)
    error = (low_out - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error <= 2 * max(float(own), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("phi", reference.FEATURES)
def test_the_reference_is_the_sum_over_blocks_that_are_left_out(phi: str) -> None:
    q, k, v, counts, ids, block_q, block_k = case(SHAPES[1])
    keep = to_blocks(counts, ids, 4)
    out = reference.remainder(q, k, v, counts, ids, block_q, block_k, phi)
    for row in range(63):
        left = [j for j in range(4) if not keep[0, 1, row // block_q, j]]
        state: Tensor = torch.zeros(8, 8, dtype=torch.float64)
        norm: Tensor = torch.zeros(8, dtype=torch.float64)
        for j in left:
            keys = reference.feature(k[1, 1, j * block_k : (j + 1) * block_k], phi)
            state = state + keys.T @ v[1, 1, j * block_k : (j + 1) * block_k]
            norm = norm + keys.sum(0)
        query = reference.feature(q[1, 1, row], phi)
        total = query @ norm
        expected = query @ state / total if total > 0 else torch.zeros(8, dtype=torch.float64)
        torch.testing.assert_close(out[1, 1, row], expected, rtol=0, atol=1e-12)


def test_an_empty_list_is_plain_linear_attention() -> None:
    q, k, v, *_ = case(SHAPES[1])
    nothing = from_blocks(torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    out = torch.ops.ditopt.linear_remainder.default(q, k, v, *nothing, 16, 16, "elu")
    a, b = reference.feature(q, "elu"), reference.feature(k, "elu")
    expected = a @ (b.transpose(-1, -2) @ v) / (a @ b.sum(2)[..., None])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_equal_values_are_kept_whatever_the_weights() -> None:
    q, k, v, *lists = case(SHAPES[2])
    out = torch.ops.ditopt.linear_remainder.default(q, k, torch.ones_like(v), *lists, "softmax")
    rows = out.flatten(-2)
    assert bool(((rows - 1).abs() < 1e-12).logical_or(rows == 0).all())


def test_the_projection_acts_head_by_head() -> None:
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(3, 4, 4)
    out = reference.project(x, weight)
    torch.testing.assert_close(out[1, 2, 3], weight[2] @ x[1, 2, 3])


def test_the_operator_passes_opcheck_and_refuses_unknown_features() -> None:
    args = case(SHAPES[2])
    operator = torch.ops.ditopt.linear_remainder.default
    torch.library.opcheck(operator, (*args, "relu"), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="feature: must be one of softmax, elu, relu, got 'cos'"):
        operator(*args, "cos")
    assert ops.feature is reference.feature
