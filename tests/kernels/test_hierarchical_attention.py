"""Hierarchical top-k: the reference against loops in fp64, the kernels against the reference."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditopt.kernels.block_sparse_attention import reference as block_sparse
from ditopt.kernels.block_sparse_attention.api import validate_lists
from ditopt.kernels.hierarchical_attention import api, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def qkv(n: int, batch: int = 1, heads: int = 1, d: int = 16, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(n)
    return [torch.randn(batch, n, heads, d, **kwargs).transpose(1, 2) for _ in "qkv"]


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, block: int, top_k: int, depth: int, coarse: bool, scale: float
) -> Tensor:
    """The docstring, query block by query block, for one head [N, D]."""
    n = len(q)
    pooled = {
        level: [torch.stack([part.mean(0) for part in x.split(block**level)]) for x in (q, k, v)]
        for level in range(1, depth + 1)
    }
    kept: dict[int, list[list[int]]] = {}
    seen: dict[int, list[list[int]]] = {}
    for level in range(depth, 0, -1):
        queries, keys, _ = pooled[level]
        kept[level], seen[level] = [], []
        for i, query in enumerate(queries):
            allowed = list(range(len(keys)))
            if level < depth:
                parents = kept[level + 1][i // block]
                allowed = [j for j in allowed if j // block in parents]
            order = sorted(allowed, key=lambda j: (-float(query @ keys[j]), j))
            kept[level].append(sorted(order[:top_k]))
            seen[level].append(allowed)
    out = torch.empty_like(q)
    for i in range(n):
        columns, values, bias = [], [], []
        for j in kept[1][i // block]:
            columns.append(k[j * block : (j + 1) * block])
            values.append(v[j * block : (j + 1) * block])
            bias += [0.0] * len(columns[-1])
        for level in range(1, depth + 1) if coarse else ():
            size = block**level
            for j in seen[level][i // size]:
                columns.append(pooled[level][1][j : j + 1])
                values.append(pooled[level][2][j : j + 1])
                bias.append(math.log(min(size, n - j * size)))
        scores = scale * torch.cat(columns) @ q[i] + torch.tensor(bias, dtype=q.dtype)
        out[i] = scores.softmax(0) @ torch.cat(values)
    return out


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("n", "block", "top_k", "depth"), [(7, 4, 2, 1), (50, 4, 2, 2), (90, 4, 3, 3), (64, 4, 4, 2)]
)
def test_the_reference_does_what_it_says(
    n: int, block: int, top_k: int, depth: int, coarse: bool
) -> None:
    q, k, v = qkv(n, dtype=torch.float64)
    out = reference.attention(q, k, v, block, top_k, depth, coarse, 0.4)
    expected = by_loops(q[0, 0], k[0, 0], v[0, 0], block, top_k, depth, coarse, 0.4)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=1e-12)


def test_keeping_every_block_is_dense_attention() -> None:
    q, k, v = qkv(60, 2, 3, dtype=torch.float64)
    out = api.hierarchical_attention(q, k, v, top_k=4, depth=1, coarse=False)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-12)


def test_fine_attention_is_block_sparse_attention_over_the_lists() -> None:
    q, k, v = qkv(300, 2, 2, dtype=torch.float64)
    scale = 0.3
    counts, ids = torch.ops.ditopt.select_blocks_hierarchical.default(q, k, 16, 4, 2, scale)
    validate_lists(counts, ids, 300, 300, 16, 16)
    out = api.hierarchical_attention(q, k, v, top_k=4, depth=2, coarse=False, scale=scale)
    expected = block_sparse.block_sparse_attention(q, k, v, counts, ids, 16, 16, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_pooled_tokens_of_equal_keys_stand_for_them_exactly() -> None:
    """Where keys of a block are equal, its mean counted 16 times is the block."""
    n = 256
    q, _, v = qkv(n, dtype=torch.float64)
    k = torch.randn(1, 1, n // 16, 16, dtype=torch.float64).repeat_interleave(16, 2)
    q = q.reshape(1, 1, 16, 16, 16).mean(3).repeat_interleave(16, 2)
    kept = reference.select(q, k, 16, 1, 1, 1.0)[0]
    out = reference.attention(q, k, v, 16, 1, 1, True, 1.0)
    # The kept block is counted twice, fine and pooled: as the paper has it.
    weights = torch.exp(q @ k.transpose(-1, -2))
    twice = torch.arange(n)[None] // 16 == kept[0, 0].repeat_interleave(16, 0)
    weights = weights * (1 + twice)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "depth"), [(16, 1), (4096, 1), (4097, 2), (65536, 2), (65537, 3), (1 << 20, 3)]
)
def test_levels(n: int, depth: int) -> None:
    assert reference.levels(n) == depth
    assert depth == max(1, math.ceil(math.log(n / 256) / math.log(16) - 1e-9))


def test_density_falls_like_log_n_over_n() -> None:
    kept = {n: reference.kept_fraction(n, 16, 8, reference.levels(n), True) * n for n in
            (1 << 14, 1 << 16, 1 << 20)}  # fmt: skip
    assert kept[1 << 16] == 128 * 2 + 256
    assert kept[1 << 20] == 128 * 3 + 256


def test_the_operators_pass_opcheck() -> None:
    q, k, v = qkv(90, 2, 2)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.ditopt
    torch.library.opcheck(
        ops.hierarchical_attention.default, (q, k, v, 16, 4, 1, True, 0.2), test_utils=tests
    )
    torch.library.opcheck(
        ops.select_blocks_hierarchical.default, (q, k, 16, 4, 1, 0.2), test_utils=tests
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 17}, r"top_k: must lie in \[1, 16\]"),
        ({"block": 1}, "block: must be at least 2"),
        ({"depth": 0}, "depth: must be positive"),
        ({"scale": math.nan}, "scale: must be finite"),
        ({"k": torch.ones(1, 1, 32, 8)}, "k: must have q's shape"),
        ({"v": torch.ones(1, 1, 0, 8)}, "v: must be .batch, head, token, channel. with tokens"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    q = torch.ones(1, 1, 40, 8)
    arguments: Any = {"q": q, "k": q, "v": q, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        api.hierarchical_attention(
            arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments
        )


@needs_triton
@pytest.mark.parametrize(
    ("n", "top_k", "depth", "coarse"),
    [(1, 1, 1, True), (40, 4, 1, True), (300, 2, 1, False), (515, 4, 2, True), (1000, 2, 2, True)],
)
def test_the_kernels_equal_the_reference(n: int, top_k: int, depth: int, coarse: bool) -> None:
    from ditopt.kernels.hierarchical_attention import triton

    q, k, v = (x.to(DEVICE) for x in qkv(n, 1, 2))
    scale = 0.3
    for mine, level in zip(triton.pool_levels(k, depth), range(1, depth + 1), strict=True):
        torch.testing.assert_close(mine, reference.pool(k, 16**level), rtol=1e-5, atol=1e-6)
    out = triton.attention(q, k, v, top_k, depth, coarse, scale)
    exact = reference.attention(*(x.double() for x in (q, k, v)), 16, top_k, depth, coarse, scale)
    error = float((out - exact).norm() / exact.norm())
    own = reference.attention(q, k, v, 16, top_k, depth, coarse, scale)
    floor = torch.finfo(torch.float32).eps
    assert error <= 2 * max(float((own - exact).norm() / exact.norm()), floor)
