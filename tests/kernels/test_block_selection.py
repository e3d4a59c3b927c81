"""Selectors: rules against their words, pooled scores and mass against fp64, kernels against both.

The Triton kernels run on the GPU, or in Triton's interpreter where that is installed.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.kernels.block_selection import api, reference
from ditopt.kernels.block_sparse_attention.api import validate_lists
from ditopt.kernels.block_sparse_attention.lists import to_blocks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SHAPES = [  # batch, heads, n_q, n_k, head size, block_q, block_k
    (1, 2, 100, 100, 16, 16, 16),
    (2, 1, 63, 200, 24, 32, 16),
    (1, 1, 5, 5, 8, 16, 16),
    (1, 2, 300, 300, 40, 16, 32),
]
RULES = [
    ("top_k", 0.3, 1),
    ("top_k", 0.01, 2),
    ("top_p", 0.6, 1),
    ("top_p", 0.05, 3),
    ("top_p", 1.0, 1),
    ("threshold", 1.0, 1),
    ("threshold", 5.0, 2),
]


def qk(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """q and k as views of [B, N, H, D] memory; keys lie away from zero, as in trained models."""
    batch, heads, n_q, n_k, d, *_ = shape
    torch.manual_seed(1)
    q, k = (torch.randn(batch, n, heads, d, dtype=dtype).transpose(1, 2) for n in (n_q, n_k))
    return q, k + 3


def forced_blocks(rows: int, width: int) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(2)) < 0.1


def scores_of(rows: int, width: int, seed: int) -> Tensor:
    """Scores with ties: every value stands about twice."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, max(1, width // 2) * 4, (1, 1, rows, width), generator=generator)
    return values.float() / 8


def by_words(
    scores: list[float],
    lengths: list[int],
    forced: list[bool],
    rule: str,
    amount: float,
    least: int,
) -> set[int]:
    """The rules of the docstring, read aloud for one row."""
    n = len(scores)
    weighted = [s + math.log(x) for s, x in zip(scores, lengths, strict=True)]
    order = sorted(range(n), key=lambda j: (not forced[j], -weighted[j], j))
    kept = {j for j in range(n) if forced[j]}
    if rule == "top_k":
        kept |= set(order[: max(least, math.ceil(amount * n))])
    elif rule == "threshold":
        mean = sum(scores) / n
        spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / n)
        kept |= {j for j in range(n) if scores[j] > mean + amount * spread}
    else:
        top = max(weighted)
        weights = [math.exp(w - top) for w in weighted]
        mass = 0.0
        for place, j in enumerate(order):
            if mass >= amount * sum(weights) and not forced[j]:
                same = not forced[order[place - 1]] and weighted[j] == weighted[order[place - 1]]
                if not same:
                    break
            kept.add(j)
            mass += weights[j]
    return kept | set(order[: min(n, least)])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 20), st.integers(0, 99), st.integers(1, 9),
    st.sampled_from(["top_k", "top_p", "threshold"]),
    st.sampled_from([0.07, 0.31, 0.55, 0.93]), st.integers(1, 4),
)  # fmt: skip
def test_rules_do_what_they_say(
    rows: int, width: int, seed: int, tail: int, rule: str, amount: float, minimum: int
) -> None:
    scores = scores_of(rows, width, seed).double()
    lengths = torch.tensor([9] * (width - 1) + [tail])
    forced = forced_blocks(rows, width)
    keep = reference.choose(scores, lengths, forced, rule, amount, minimum)
    for row in range(rows):
        expected = by_words(
            scores[0, 0, row].tolist(),
            lengths.tolist(),
            forced[row].tolist(),
            rule,
            amount,
            minimum,
        )
        assert set(keep[0, 0, row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooled_scores_rank_as_the_definition(shape: tuple[int, ...]) -> None:
    q, k = qk(shape, torch.float64)
    block_q, block_k = shape[-2:]
    scale = 0.3
    scores = reference.score_means(reference.pool(q, block_q), reference.pool(k, block_k), scale)
    for i, rows in enumerate(q.split(block_q, 2)):
        for j, keys in enumerate(k.split(block_k, 2)):
            raw = scale * (rows.mean(2) * keys.mean(2)).sum(-1)
            first = scale * (rows.mean(2) * k[:, :, :block_k].mean(2)).sum(-1)
            shift = scores[:, :, i, j] - scores[:, :, i, 0]
            torch.testing.assert_close(shift, raw - first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_mass_sums_to_the_queries_and_is_the_softmax(shape: tuple[int, ...]) -> None:
    q, k = qk(shape, torch.float64)
    block_q, block_k = shape[-2:]
    scores = 0.2 * q @ k.transpose(-1, -2)
    mass = reference.block_mass(q, k, scores.logsumexp(-1), block_q, block_k, 0.2)
    lengths = reference.block_lengths(shape[2], block_q, q.device).double()
    torch.testing.assert_close(mass.sum(-1), lengths.expand(mass.shape[:3]), rtol=1e-12, atol=0)
    weights = torch.softmax(scores, -1)[:, :, :block_q, :block_k].sum((-1, -2))
    torch.testing.assert_close(mass[:, :, 0, 0], weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exact", [False, True], ids=["pooled", "mass"])
@pytest.mark.parametrize(("rule", "amount", "minimum"), RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_are_valid_and_keep_what_is_forced(
    shape: tuple[int, ...], rule: Any, amount: float, minimum: int, exact: bool
) -> None:
    q, k = qk(shape)
    block_q, block_k = shape[-2:]
    rows, width = -(-shape[2] // block_q), -(-shape[3] // block_k)
    forced = forced_blocks(rows, width)
    lse = (q @ k.transpose(-1, -2) * shape[4] ** -0.5).logsumexp(-1) if exact else None
    counts, ids = api.select_blocks(
        q, k, block_q=block_q, block_k=block_k, rule=rule, amount=amount, minimum=minimum,
        forced=forced, lse=lse,
    )  # fmt: skip
    validate_lists(counts, ids, shape[2], shape[3], block_q, block_k)
    kept = to_blocks(counts, ids, width)
    assert bool((kept | ~forced).all())
    assert int(counts.min()) >= min(minimum, width)


def test_more_mass_keeps_more_blocks() -> None:
    q, k = qk(SHAPES[0])
    counts = [
        api.select_blocks(q, k, block_q=16, block_k=16, rule="top_p", amount=p)[0].sum().item()
        for p in (0.2, 0.5, 0.8, 0.99)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_exact_mass_finds_what_pooled_means_hide() -> None:
    """A block whose one strong key is cancelled in its mean."""
    k = torch.zeros(1, 1, 64, 4)
    k[0, 0, 40], k[0, 0, 41] = 8.0, -8.0
    q = torch.ones(1, 1, 64, 4)
    lse = (q @ k.transpose(-1, -2)).logsumexp(-1)
    arguments: Any = {"block_q": 16, "block_k": 16, "rule": "top_k", "amount": 0.25, "scale": 1.0}
    assert api.select_blocks(q, k, **arguments)[1][..., 0].eq(0).all()
    assert api.select_blocks(q, k, lse=lse, **arguments)[1][..., 0].eq(2).all()


def test_the_operators_pass_opcheck() -> None:
    q, k = qk(SHAPES[1])
    forced = forced_blocks(2, 13)
    rest = (32, 16, "top_p", 0.5, 1, 0.2)
    lse = torch.randn(q.shape[:3])
    for operator, arguments in (
        (torch.ops.ditopt.select_blocks_pooled.default, (q, k, forced, *rest)),
        (torch.ops.ditopt.select_blocks_mass.default, (q, k, lse, forced, *rest)),
        (torch.ops.ditopt.block_mass.default, (q, k, lse, 32, 16, 0.2)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule: must be one of top_k, top_p, threshold, got 'best'"),
        ({"amount": 0.0}, "amount: must lie in"),
        ({"minimum": 0}, "minimum: must be positive, got 0"),
        ({"block_q": 0}, "block_q: must be positive, got 0"),
        ({"forced": torch.ones(3, 7, dtype=torch.bool)}, r"forced: .* = \[7, 7\], got"),
        ({"lse": torch.ones(1, 2, 99)}, r"lse: .* = \[1, 2, 100\], got \[1, 2, 99\]"),
        ({"scale": math.inf}, "scale: must be finite, got inf"),
        ({"k": torch.ones(1, 2, 100, 8)}, "k: must have q's batch, heads and channels"),
        ({"k": torch.ones(1, 2, 100, 16).half()}, "k: must be floating point and of q's dtype"),
        ({"q": torch.ones(2, 100, 16)}, "q: must be .batch, head, token, channel"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    q, k = qk(SHAPES[0])
    arguments: Any = {"block_q": 16, "block_k": 16, "rule": "top_k", "amount": 0.5}
    tensors = {"q": changes.pop("q", q), "k": changes.pop("k", k)}
    with pytest.raises(ValueError, match=f"^{message}"):
        api.select_blocks(**tensors, **(arguments | changes))


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(shape: tuple[int, ...]) -> None:
    from ditopt.kernels.block_selection import triton

    q, k = (x.to(DEVICE) for x in qk(shape))
    block_q, block_k = shape[-2:]
    for x, block in ((q, block_q), (k, block_k)):
        torch.testing.assert_close(triton.pool(x, block), reference.pool(x, block))
    scores = q @ k.transpose(-1, -2) * 0.2
    lse = scores.logsumexp(-1)
    mass = triton.block_mass(q, k, lse, block_q, block_k, 0.2)
    # float32 throughout, in another order of summation
    torch.testing.assert_close(
        mass, reference.block_mass(q, k, lse, block_q, block_k, 0.2), rtol=1e-4, atol=1e-5
    )


@needs_triton
@pytest.mark.parametrize(("rule", "amount", "minimum"), RULES)
@pytest.mark.parametrize("width", [1, 7, 13])
def test_the_kernel_chooses_as_the_reference(
    width: int, rule: str, amount: float, minimum: int
) -> None:
    from ditopt.kernels.block_selection import triton

    n_k, block_k, rows = width * 16 - 3, 16, 5
    # No ties: where the mass is reached, a sum's last bit would decide between equal blocks.
    scores = torch.randn(1, 2, rows, width, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if rule == "top_k":
        scores = scores_of(rows, width, 3).expand(1, 2, -1, -1).contiguous().to(DEVICE)
    forced = forced_blocks(rows, width).to(DEVICE)
    lengths = reference.block_lengths(n_k, block_k, scores.device)
    keep = reference.choose(scores, lengths, forced, rule, amount, minimum)
    counts, ids = triton.choose(scores, n_k, block_k, forced, rule, amount, minimum)
    expected_counts, expected_ids = reference.from_blocks(keep)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(ids, expected_ids)
