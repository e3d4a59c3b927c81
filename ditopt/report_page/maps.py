"""Attention maps of all heads in a bounded number of bytes, with their recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditopt.profiling.map_record import MapRecord, maps_path
from ditopt.profiling.maps import RECALL_LEVELS
from ditopt.report_page.blocks import Floats, encode, merged, unpack

if TYPE_CHECKING:
    from ditopt.profiling.schema import Profile

MAX_BYTES = 1_500_000
"""Of all maps and block sets together, before base64 makes a third more of it."""

MAX_SIDE = 64
"""Blocks along a side of a drawn map at most; larger ones are merged."""

_SET_SIDE = 256  # recorded block sets are merged to that, see `HeadMaps.top`


@dataclass(frozen=True)
class Detail:
    """How much of the maps a page can hold.

    Attributes:
        side: blocks along a side at most.
        per_call: a map for each observed call; else their mean.
    """

    side: int
    per_call: bool


def affordable(profile: Profile) -> Detail:
    """The most detail that stays below `MAX_BYTES`: calls are given up first, then resolution."""
    tried = ((MAX_SIDE, True), (MAX_SIDE, False), (32, False), (16, False), (8, False))
    for side, per_call in tried:
        blocks = sum(
            shape.heads
            * min(side, -(-shape.tokens // profile.block.q))
            * min(side, -(-shape.tokens // profile.block.k))
            for shape in profile.shapes.values()
        )
        calls = len(profile.observed_calls) if per_call else 1
        if 2 * calls * blocks <= MAX_BYTES:
            break
    return Detail(side, per_call)


@dataclass(frozen=True)
class Maps:
    """Maps of all profiled sites, means over seeds; O is 1 where calls are not told apart.

    Attributes:
        page: what the script draws: for each site `values`, square roots of the mass over the
            largest of a head, and `top`, blocks that hold 0.9 of it, both [O, H, r, c].
        kept: per site [O, H, C], share of the attention that each option keeps.
    """

    page: dict[str, Any]
    kept: dict[str, Floats]


def load_maps(folder: Path, profile: Profile, detail: Detail) -> Maps | None:
    """The maps of the seeds that have some; None where no seed has.

    Raises:
        ProfileError: a file is damaged or of other sizes than the profile says.
    """
    seeds = [seed for seed in profile.seeds if maps_path(folder, seed).is_file()]
    if not seeds:
        return None
    records = [MapRecord.load(folder, seed, profile) for seed in seeds]
    observed = profile.observed_calls
    calls = [f"call {call}" for call in observed]
    if not detail.per_call:
        calls = [f"mean of {len(observed)} calls, {observed[0]} to {observed[-1]}"]
    sites = {site: _site(records, site, profile, detail) for site in profile.shapes}
    kept = {
        site: _mean([record.kept[site].numpy() for record in records], detail)
        for site in profile.shapes
    }
    return Maps({"levels": list(RECALL_LEVELS), "calls": calls, "sites": sites}, kept)


def _site(
    records: Sequence[MapRecord], site: str, profile: Profile, detail: Detail
) -> dict[str, Any]:
    tokens, block = profile.shapes[site].tokens, profile.block
    grid = [-(-tokens // size) for size in (block.q, block.k)]
    mass = _mean([record.mass[site].numpy() for record in records], detail)
    means, wide = merged(mass, detail.side)
    mass = means * wide
    mass /= np.maximum(mass.sum(axis=-1, keepdims=True), 1e-30)  # float16 rounds
    largest = np.maximum(mass.max(axis=(-2, -1)), 1e-12)
    recall = _mean([record.recall[site].numpy() for record in records], detail)
    sides = [-(-size // -(-size // _SET_SIDE)) for size in grid]
    sets = [unpack(record.top[site].numpy(), sides[0], sides[1]) for record in records]
    return {
        "rows": mass.shape[-2],
        "columns": mass.shape[-1],
        "merged": grid != list(mass.shape[-2:]),
        "values": encode(np.sqrt(mass / largest[..., None, None])),
        "largest": [float(f"{value:.4g}") for value in largest.ravel().tolist()],
        "top": encode(merged(_mean(sets, detail), detail.side)[0]),
        "recall": np.round(recall.reshape(-1, recall.shape[-1]), 4).tolist(),
    }


def _mean(arrays: Sequence[Any], detail: Detail) -> Floats:
    """Over seeds, and over calls where those are not told apart: [O, H, ...] float64."""
    mean = np.mean([array.astype(np.float64) for array in arrays], axis=0)
    return np.asarray(mean if detail.per_call else mean.mean(axis=0, keepdims=True))
