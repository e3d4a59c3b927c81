"""Candidate errors against attention with an explicit token mask in float64."""

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_selection.reference import block_mass
from ditopt.kernels.block_sparse_attention.api import block_sparse_attention_with_lse
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.profiling.candidates import candidate_errors


def oracle(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | bool, scale: float) -> Tensor:
    scores = (q.double() @ k.double().mT * scale).masked_fill(
        ~torch.as_tensor(allowed), float("-inf")
    )
    return scores.softmax(-1).nan_to_num(0.0) @ v.double()


def tokens(keep: Tensor, n_q: int, n_k: int, block_q: int, block_k: int) -> Tensor:
    return keep.repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)[:n_q, :n_k]


def with_means(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, **block: int) -> Tensor:
    """The kernels' specification of the block-mean remainder, in float64."""
    lists = from_blocks(keep[None, None])
    tensors = (q.double(), k.double(), v.double())
    return block_sparse_attention_with_lse(
        *tensors, *lists, **block, scale=scale, impl="reference", dropped="mean"
    )[0]


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
        means = with_means(q, k, v, keep[c], 0.7, block_q=block_q, block_k=block_k)
        expected = (means - dense).square().sum((0, 2, 3))
        torch.testing.assert_close(found.mean_error[:, c], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (33, 71)])
def test_mass_is_exact_and_says_what_candidates_keep(n_q: int, n_k: int) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (n_q, n_k, n_k))
    keep = torch.rand(4, -(-n_q // 16), -(-n_k // 8)) < 0.4
    found = candidate_errors(q, k, v, keep, block_q=16, block_k=8, scale=0.9)
    lse = (q.double() @ k.double().mT * 0.9).logsumexp(-1)
    total = block_mass(q.double(), k.double(), lse, 16, 8, 0.9).sum(0)
    rows = total / total.sum(-1, keepdim=True)
    torch.testing.assert_close(found.mass.double(), rows, rtol=1e-4, atol=1e-7)
    expected = (total[:, None] * keep).sum((2, 3)) / (2 * n_q)
    torch.testing.assert_close(found.kept_mass, expected, rtol=1e-5, atol=1e-7)


def test_chosen_blocks_differ_by_head_and_sample() -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 3, 48, 8).unbind()
    keep, chosen = torch.rand(2, 3, 6) < 0.5, torch.rand(2, 3, 4, 3, 6) < 0.5
    sizes = {"block_q": 16, "block_k": 8, "scale": 0.5}
    found = candidate_errors(q, k, v, keep, chosen=chosen, **sizes)
    for h in range(3):
        parts = [
            candidate_errors(
                *(x[b : b + 1, h : h + 1] for x in (q, k, v)),
                torch.cat([keep, chosen[b, h]]),
                **sizes,
            )
            for b in range(2)
        ]
        for name in ("squared_error", "mean_error"):
            error = sum(getattr(part, name)[0] for part in parts)
            torch.testing.assert_close(getattr(found, name)[h], error, rtol=1e-5, atol=1e-9)


def test_blocks_far_below_the_maximum_stay_exact() -> None:
    """Scores 200 apart: exp of the difference is 0 in float32, the kept block's softmax is not."""
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([200.0, 200, 200, 200, 0, 1, 2, 3]).view(1, 1, 8, 1)
    v = torch.arange(8.0).view(1, 1, 8, 1)
    keep = torch.tensor([[[False, True]]])
    found = candidate_errors(q, k, v, keep, block_q=4, block_k=4, scale=1.0)
    sparse = torch.tensor([0.0, 1, 2, 3]).softmax(0) @ torch.arange(4.0, 8)
    assert found.squared_error.item() == pytest.approx(4 * (sparse.item() - 1.5) ** 2, rel=1e-5)


def test_both_ways_of_mixing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    keep = torch.rand(6, 5, 5) < 0.5
    keep[0] = False
    fast = candidate_errors(q, k, v, keep, block_q=8, block_k=8, scale=1.5)
    monkeypatch.setattr("ditopt.profiling.candidates._TINY", 2.0)
    exact = candidate_errors(q, k, v, keep, block_q=8, block_k=8, scale=1.5)
    for name in ("squared_error", "mean_error", "kept_mass", "squared_norm"):
        torch.testing.assert_close(
            getattr(fast, name), getattr(exact, name), rtol=1e-4, atol=1e-8, msg=name
        )
    torch.testing.assert_close(fast.mass, exact.mass, rtol=1e-5, atol=1e-7)


def test_heads_in_turns_give_the_same() -> None:
    q, k, v = torch.randn(3, 1, 4, 32, 8).unbind()
    keep = torch.rand(3, 4, 4) < 0.5
    sizes = {"block_q": 8, "block_k": 8, "scale": 1.0}
    whole = candidate_errors(q, k, v, keep, **sizes)
    parts = candidate_errors(q, k, v, keep, **sizes, scratch_bytes=1)
    torch.testing.assert_close(parts.squared_error, whole.squared_error)
    torch.testing.assert_close(parts.mass, whole.mass)
