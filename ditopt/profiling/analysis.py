"""What a profile says about each head: its class, how sure that is, and whether it stays.

A head's class is that of the static pattern with the smallest output error at equal density; the
density is where some pattern first holds most of the attention. A head without such a pattern looks
for content (its attention is concentrated between clusters) or for everything. Blocks that are the
same for all seeds and steps can be fixed in a plan; others have to be chosen online (AdaSpa,
2502.21079) or kept (attention.md, section 6).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.stats import rankdata

from ditopt import files
from ditopt.errors import ProfileError
from ditopt.profiling.map_record import MapRecord
from ditopt.profiling.maps import RECALL_LEVELS, jaccard
from ditopt.profiling.schema import load_complete
from ditopt.profiling.structure import Structure, structure_of

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.profiling.schema import Profile, SeedRecord

ANALYSIS_NAME = "analysis.json"

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Verdict = Literal["static", "refresh", "dense"]

_HELD = 0.8
"""Share of the attention that a pattern has to hold to explain a head."""
_SPARSE = 0.7
"""A head that needs more of its blocks or pairs has no structure to use."""
_ROOM = 1.25
"""Patterns up to this many times the density of the sparsest explanation are compared."""
_STABLE = 0.8
"""Jaccard index or rank correlation from which on a head is the same everywhere."""
_AT_90 = RECALL_LEVELS.index(0.9)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadAnalysis(_Part):
    """One head, over all seeds and observed calls.

    Attributes:
        kind: of the best pattern at equal density; `selector` where only content explains the
            head, `dense` where nothing sparse does.
        structure: what that stands for.
        margin: decibels by which the best pattern of another structure errs more (an output of
            zero where none is offered at that density); for a head without a pattern, of the
            density that it needs below (`cluster`) or above (`diffuse`) what counts as sparse.
        option: number of that pattern in the profile's options; 0 where none explains the head.
        density_at_recall_90: least density that holds 0.9 of the attention: of blocks in the
            model's own order, and for `cluster` of pairs of clusters.
        jaccard_seeds: shared over joint blocks of the sets that hold 0.9, mean over pairs of seeds
            at the same call; None with one seed.
        jaccard_steps: the same over pairs of observed calls of a seed; None with one call.
        rank_seeds: rank correlation between seeds of the errors at equal density, likewise.
        rank_steps: the same between calls.
        verdict: `static` (blocks can be fixed), `refresh` (chosen online) or `dense`.
        effective_rank: of the attention outside the top blocks, see `HeadMaps.rank`.
    """

    kind: str
    structure: Structure
    margin: float
    option: int
    density_at_recall_90: float
    jaccard_seeds: float | None
    jaccard_steps: float | None
    rank_seeds: float | None
    rank_steps: float | None
    verdict: Verdict
    effective_rank: float


class Analysis(_Part):
    """Every profiled head, by site.

    Attributes:
        ditopt_analysis: version of this schema.
        seeds: that it is of.
        sites: the heads of each profiled site, in order.
    """

    ditopt_analysis: Literal[1] = 1
    seeds: tuple[int, ...]
    sites: dict[str, tuple[HeadAnalysis, ...]]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """What a finished profile holds, or None where there is none.

        Raises:
            ProfileError: malformed.
        """
        path = Path(folder) / ANALYSIS_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(files.read_text(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProfileError(
                f"{ANALYSIS_NAME}: {where}: {first['msg']}",
                remedy=f"Delete {ANALYSIS_NAME} and run the same `ditopt profile` again.",
            ) from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write analysis.json atomically."""
        files.write_json(Path(folder) / ANALYSIS_NAME, self.model_dump(mode="json"))


def analyse(profile: Profile, records: Sequence[SeedRecord], maps: Sequence[MapRecord]) -> Analysis:
    """The analysis of a profile with the tensors of its seeds, in the order of `profile.seeds`."""
    sites = {}
    for site in profile.shapes:
        seen = _SiteView.of(profile, records, maps, site)
        sites[site] = tuple(seen.head(h) for h in range(seen.error.shape[2]))
    return Analysis(seeds=profile.seeds, sites=sites)


def analyse_folder(folder: str | os.PathLike[str]) -> Analysis:
    """Analyse a finished profile and write analysis.json beside it.

    Raises:
        ProfileError: half a profile, or a damaged file.
    """
    profile, records = load_complete(folder)
    maps = [MapRecord.load(Path(folder), seed, profile) for seed in profile.seeds]
    found = analyse(profile, records, maps)
    found.save(folder)
    return found


@dataclass(frozen=True)
class _SiteView:
    """One site over S seeds, O calls, H heads and the C options that leave dropped blocks out.

    Attributes:
        numbers: [C] of those options in the profile.
        structures: [C] what they stand for.
        density: [C] kept fraction of blocks.
        error: [S, O, H, C] squared error over the squared norm of the head.
        kept: [H, C] share of the attention, mean over seeds and calls.
        recall: [H] density that holds 0.9 by blocks.
        clusters: [H] the same by clusters.
        rank: [H].
        top: packed sets, uint8 [S, O, H, bytes].
    """

    profile: Profile
    numbers: list[int]
    structures: list[Structure | None]
    density: Floats
    error: Floats
    kept: Floats
    recall: Floats
    clusters: Floats
    rank: Floats
    top: Tensor

    @classmethod
    def of(
        cls,
        profile: Profile,
        records: Sequence[SeedRecord],
        maps: Sequence[MapRecord],
        site: str,
    ) -> _SiteView:
        numbers = [n for n, option in enumerate(profile.options) if option.remainder == "drop"]
        patterns = [profile.options[n].pattern for n in numbers]
        layout = profile.layout
        norm = torch.stack([r.squared_norm[site] for r in records])[..., None].clamp(min=1e-30)
        error = torch.stack([r.squared_error[site] for r in records])[..., numbers] / norm

        def mean(tensors: list[Tensor], axes: tuple[int, ...]) -> Floats:
            return np.asarray(torch.stack(tensors).double().mean(axes).numpy())

        return cls(
            profile=profile,
            numbers=numbers,
            structures=[None if layout is None else structure_of(p, layout) for p in patterns],
            density=np.array(profile.kept(profile.shapes[site]))[numbers],
            error=error.numpy(),
            kept=mean([m.kept[site] for m in maps], (0, 1))[:, numbers],
            recall=mean([m.recall[site][..., _AT_90] for m in maps], (0, 1)),
            clusters=mean([m.clusters[site][:, _AT_90] for m in maps], (0,)),
            rank=mean([m.rank[site] for m in maps], (0, 1)),
            top=torch.stack([m.top[site] for m in maps]),
        )

    def head(self, h: int) -> HeadAnalysis:
        """All about one head."""
        structure, number, margin, compared = self._structure(h)
        by_content = structure == "cluster"
        kind = self.profile.options[number].pattern.kind if number else None
        sets, errors = self.top[:, :, h], self.error[:, :, h][..., compared]
        jaccards = [_pairs(sets, axis, _overlap) for axis in (0, 1)]
        ranks = [_pairs(errors, axis, _rank_correlation) for axis in (0, 1)]
        return HeadAnalysis(
            kind=kind or ("selector" if by_content else "dense"),
            structure=structure,
            margin=round(margin, 3),
            option=number,
            density_at_recall_90=round(
                float(self.clusters[h] if by_content else self.recall[h]), 5
            ),
            jaccard_seeds=jaccards[0],
            jaccard_steps=jaccards[1],
            rank_seeds=ranks[0],
            rank_steps=ranks[1],
            verdict=_verdict(structure, jaccards, ranks),
            effective_rank=round(float(self.rank[h]), 2),
        )

    def _structure(self, h: int) -> tuple[Structure, int, float, Bools]:
        """Class, number of the option (0: none), margin in dB, and the options compared, [C]."""
        named = np.array([s is not None for s in self.structures])
        holds = named & (self.kept[h] >= _HELD) & (self.density <= _SPARSE)
        if not holds.any():
            content, blocks = self.clusters[h], self.recall[h]
            needed = min(content, blocks)
            structure: Structure = "cluster" if needed <= _SPARSE else "diffuse"
            return structure, 0, abs(10 * float(np.log10(_SPARSE / max(needed, 1e-9)))), named
        equal = named & (self.density <= _ROOM * self.density[holds].min())
        error = np.where(equal, self.error[:, :, h].mean(axis=(0, 1)), np.inf)
        best = int(error.argmin())
        found = self.structures[best]
        assert found is not None
        others = [e for e, s in zip(error, self.structures, strict=True) if s not in (found, None)]
        second = min([*others, 1.0])
        margin = 10 * float(np.log10(max(second, 1e-30) / max(error[best], 1e-30)))
        return found, self.numbers[best], margin, equal


def _verdict(
    structure: Structure, jaccards: Sequence[float | None], ranks: Sequence[float | None]
) -> Verdict:
    """A pattern whose blocks hardly change, or that always ranks alike, can be fixed."""
    if structure == "diffuse":
        return "dense"
    same = (all(x is None or x >= _STABLE for x in values) for values in (jaccards, ranks))
    return "static" if structure != "cluster" and any(same) else "refresh"


def _pairs(values: Any, axis: int, likeness: Callable[[Any, Any], float]) -> float | None:
    """Mean likeness of any two of [S, O, ...] along the first or second axis; None for one."""
    count = values.shape[axis]
    if count < 2:
        return None
    lines = values if axis == 0 else values.swapaxes(0, 1)
    found = [likeness(lines[a], lines[b]) for a, b in combinations(range(count), 2)]
    return round(float(np.mean(found)), 4)


def _overlap(a: Tensor, b: Tensor) -> float:
    return float(jaccard(a, b).mean())


def _rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's, of errors [n, C], mean over n; 1 where all are equal or nothing is ranked."""
    if a.size == 0:
        return 1.0
    ranks = [rankdata(x, axis=1) for x in (a, b)]
    x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    spread = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return float(np.where(spread > 0, (x * y).sum(1) / np.maximum(spread, 1e-30), 1.0).mean())
