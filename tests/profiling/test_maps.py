"""Recall, block sets, pictures and ranks against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditopt.profiling.cluster_maps import cluster_recall
from ditopt.profiling.maps import (
    RECALL_LEVELS,
    HeadMaps,
    effective_rank,
    jaccard,
    merge,
    pack,
    recall_curve,
    top_blocks,
)


def random_mass(heads: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(heads, rows, columns, generator=generator) ** 6
    return mass / mass.sum(-1, keepdim=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_top_blocks_are_the_fewest_that_hold_the_share(
    rows: int, columns: int, seed: int
) -> None:
    mass = random_mass(2, rows, columns, seed)
    kept, curve = top_blocks(mass, 0.9), recall_curve(mass)
    for h in range(2):
        values = np.sort(mass[h].double().numpy().ravel())[::-1]
        total = values.sum()  # float32 rows sum to 1 up to their rounding
        for level, density in zip(RECALL_LEVELS, curve[h].tolist(), strict=True):
            count = round(density * values.size)
            assert values[:count].sum() >= level * total * (1 - 1e-12)
            assert count == 1 or values[: count - 1].sum() < level * total * (1 + 1e-12)
        assert kept[h].sum() == round(curve[h, RECALL_LEVELS.index(0.9)].item() * values.size)
        assert mass[h][kept[h]].sum() >= 0.9 * rows * (1 - 1e-6)


@pytest.mark.parametrize("size", [(64, 64), (65, 130), (200, 7)])
def test_merged_rows_still_sum_to_one(size: tuple[int, int]) -> None:
    mass = random_mass(3, *size)
    found = merge(mass, 64)
    assert max(found.shape[1:]) <= 64
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))
    step = -(-size[0] // 64)
    torch.testing.assert_close(found[:, 0].sum(-1), mass[:, :step].mean(1).sum(-1))


def test_packed_sets_compare_as_sets() -> None:
    a, b = (torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(s)) < 0.5 for s in (0, 1))
    assert pack(a).shape == (2, 5)
    expected = (a & b).sum((1, 2)) / (a | b).sum((1, 2))
    torch.testing.assert_close(jaccard(pack(a), pack(b)), expected.double(), rtol=1e-6, atol=0)
    assert jaccard(pack(a), pack(a)).tolist() == [1.0, 1.0]
    empty = torch.zeros_like(a)
    assert jaccard(pack(empty), pack(empty)).tolist() == [1.0, 1.0]
    assert jaccard(pack(a), pack(~a)).tolist() == [0.0, 0.0]


def test_the_rank_is_that_of_what_the_top_blocks_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 32, 2, generator=generator) @ torch.rand(1, 2, 32, generator=generator)
    assert effective_rank(low).item() <= 2
    assert effective_rank(torch.eye(32)[None]).item() == 32
    assert effective_rank(torch.zeros(1, 8, 8)).item() == 0
    # A strong diagonal over an even rest: the rest is what the rank describes.
    mass = 0.95 * torch.eye(32)[None] + 0.05 / 32
    assert HeadMaps.of(mass).rank.item() == pytest.approx(1, abs=1)
    assert effective_rank(mass).item() > 30


def test_maps_of_long_sequences_stay_small() -> None:
    found = HeadMaps.of(random_mass(1, 300, 600))
    assert found.mass.shape == (1, 60, 60)
    assert found.top.shape == (1, 150 * 200 // 8)
    assert (found.mass.dtype, found.top.dtype) == (torch.float16, torch.uint8)


def test_clusters_hold_what_blocks_cannot() -> None:
    """Four groups in random order: a query sees a quarter of the keys, in every block."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (512,), generator=generator)
    centres = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    x = (6 * centres[labels] + 0.1 * torch.randn(512, 16, generator=generator))[None, None]
    share = torch.bincount(labels).double().square().sum() / 512**2
    found = cluster_recall(x, x, 0.5)
    assert found[0, RECALL_LEVELS.index(0.9)].item() == pytest.approx(share.item(), rel=0.15)
    even = cluster_recall(torch.zeros(1, 1, 512, 16), torch.zeros(1, 1, 512, 16), 0.5)
    assert even[0, RECALL_LEVELS.index(0.9)].item() >= 0.9
