"""Candidate errors against attention with an explicit token mask in float64."""

import pytest
import torch
from torch import Tensor

from ditopt.profiling.candidates import candidate_errors


def oracle(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | bool, scale: float) -> Tensor:
    scores = (q.double() @ k.double().mT * scale).masked_fill(
        ~torch.as_tensor(allowed), float("-inf")
    )
    return scores.softmax(-1).nan_to_num(0.0) @ v.double()


def tokens(keep: Tensor, n_q: int, n_k: int, block_q: int, block_k: int) -> Tensor:
    return keep.repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)[:n_q, :n_k]


@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (50, 50), (33, 71), (8, 8)])
def test_errors_equal_recomputation(n_q: int, n_k: int) -> None:
    torch.manual_seed(0)
    batch, heads, dim, block_q, block_k = 2, 3, 8, 16, 8
    q, k, v = (torch.randn(batch, heads, n, dim) for n in (n_q, n_k, n_k))
    shape = (-(-n_q // block_q), -(-n_k // block_k))
    keep = torch.rand(5, *shape) < 0.5
    keep[0], keep[1] = True, False
    found = candidate_errors(q, k, v, keep, block_q=block_q, block_k=block_k, scale=0.7)
    dense = oracle(q, k, v, True, 0.7)
    torch.testing.assert_close(found.squared_norm, dense.square().sum((0, 2, 3)), rtol=1e-5, atol=0)
    for c in range(5):
        sparse = oracle(q, k, v, tokens(keep[c], n_q, n_k, block_q, block_k), 0.7)
        expected = (sparse - dense).square().sum((0, 2, 3))
        torch.testing.assert_close(found.squared_error[:, c], expected, rtol=1e-4, atol=1e-9)


def test_blocks_far_below_the_maximum_stay_exact() -> None:
    """Scores 200 apart: exp of the difference is 0 in float32, the kept block's softmax is not."""
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([200.0, 200, 200, 200, 0, 1, 2, 3]).view(1, 1, 8, 1)
    v = torch.arange(8.0).view(1, 1, 8, 1)
    keep = torch.tensor([[[False, True]]])
    found = candidate_errors(q, k, v, keep, block_q=4, block_k=4, scale=1.0)
    sparse = torch.tensor([0.0, 1, 2, 3]).softmax(0) @ torch.arange(4.0, 8)
    assert found.squared_error.item() == pytest.approx(4 * (sparse.item() - 1.5) ** 2, rel=1e-5)


def test_heads_in_turns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 4, 32, 8).unbind()
    keep = torch.rand(3, 4, 4) < 0.5
    whole = candidate_errors(q, k, v, keep, block_q=8, block_k=8, scale=1.0)
    monkeypatch.setattr("ditopt.profiling.candidates._SCRATCH_BYTES", 1)
    parts = candidate_errors(q, k, v, keep, block_q=8, block_k=8, scale=1.0)
    torch.testing.assert_close(parts.squared_error, whole.squared_error)
