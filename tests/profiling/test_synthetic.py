"""Planted structure is recovered from queries, keys and values alone."""

from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from ditopt.layout import TokenLayout
from ditopt.plan import Block, Hardware, ModelRecord, Sampler
from ditopt.profiling.analysis import HeadAnalysis, analyse
from ditopt.profiling.observer import ProfileObserver
from ditopt.profiling.schema import Profile
from ditopt.profiling.structure import Structure
from ditopt.profiling.synthetic import SCALE, PlantedHead

CALLS = 2
DRAWS = (0, 1, 10, 11)  # ten times the seed plus the call


@dataclass(frozen=True)
class Site:
    id: str
    heads: int
    kind: str = "self"
    head_dim: int = 64
    mask: str = "none"


def analysed(planted: list[PlantedHead], block: int, seeds: int = 2) -> tuple[HeadAnalysis, ...]:
    """Profile the heads as one attention over two calls and some seeds."""
    layout, heads = planted[0].layout, len(planted)
    observer = ProfileObserver(layout, Block(q=block, k=block), CALLS, (0, 1), 1, 1 << 28)
    records, maps = [], []
    for seed in range(seeds):
        observer.begin_seed()
        for call in range(CALLS):
            observer.begin_call(call, 0)
            drawn = [head.operands(draw=10 * seed + call) for head in planted]
            q, k, v = (torch.stack([d[i] for d in drawn])[None] for i in range(3))
            observer.attention(Site("a#0", heads), q, k, v, SCALE, None)
            observer.stack((None,), (torch.ones(1, 4),))
        records.append(observer.finish_seed(torch.ones(CALLS)))
        maps.append(observer.maps())
    profile = Profile(
        model=ModelRecord(
            architecture="a" * 64, weights="b" * 64, name="P", sites=tuple(observer.sites.values())
        ),
        sampler=Sampler(calls=CALLS),
        hardware=Hardware(device="cpu", name="a CPU", torch="2", threads=1),
        layout=layout,
        block=Block(q=block, k=block),
        options=observer.options,
        orders=observer.choices.orders,
        shapes=observer.shapes,
        observed_calls=(0, 1),
        data_range=None,
        seeds=tuple(range(seeds)),
    )
    return analyse(profile, records, maps).sites["a#0"]


VERDICTS = {"cluster": "refresh", "diffuse": "dense"}


def check(layout: TokenLayout, block: int, seeds: range) -> None:
    kinds: tuple[Structure, ...] = get_args(Structure)
    planted = [PlantedHead(kind, layout, seed) for seed in seeds for kind in kinds]
    found = analysed(planted, block)
    right = [head.structure == said.structure for head, said in zip(planted, found, strict=True)]
    assert sum(right) >= 0.95 * len(planted)
    for head, said, same in zip(planted, found, right, strict=True):
        density = sum(head.density(block, draw) for draw in DRAWS) / len(DRAWS)
        if same:
            assert said.density_at_recall_90 == pytest.approx(density, rel=0.2), head
            assert said.verdict == VERDICTS.get(head.structure, "static"), (head, said)
            assert said.margin > 0


@pytest.mark.parametrize(
    ("layout", "block"), [(TokenLayout(8, 8, 8), 16), (TokenLayout(6, 8, 10), 16)]
)
def test_planted_heads_are_recovered(layout: TokenLayout, block: int) -> None:
    check(layout, block, range(4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "block"), [(TokenLayout(8, 8, 16), 32), (TokenLayout(6, 10, 12), 24)]
)
def test_more_planted_heads_are_recovered(layout: TokenLayout, block: int) -> None:
    check(layout, block, range(100, 116))
