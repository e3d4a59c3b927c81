"""What a rule of sparse attention is: from a profile to the choices of calls after a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ditopt.errors import PlanError
from ditopt.plan import Block, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.layout import TokenLayout
    from ditopt.patterns import HeadPattern
    from ditopt.profiling.schema import Profile, SeedRecord
    from ditopt.token_order import TokenOrder

Share = Annotated[float, Field(ge=0, le=1)]
Density = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Ground:
    """What a rule decides about.

    Attributes:
        profile: of the model.
        records: one per seed.
        layout: the profile's token grid.
        sites: attention sites that the rule may change, in execution order.
        calls: half-open range of the calls that it may change.
    """

    profile: Profile
    records: Sequence[SeedRecord]
    layout: TokenLayout
    sites: tuple[str, ...]
    calls: tuple[int, int]

    def measured(self, fits: Callable[[HeadPattern], bool]) -> list[int]:
        """Options of the profile with such patterns, in the model's order, the rest dropped."""
        return [
            index
            for index, option in enumerate(self.profile.options)
            if option.order == 0 and option.remainder == "drop" and fits(option.pattern)
        ]

    def relative_errors(self, site: str) -> Tensor:
        """Squared error of each option over the squared norm, mean over seeds, [O, H, C]."""
        errors = torch.stack([record.squared_error[site] for record in self.records]).sum(0)
        norms = torch.stack([record.squared_norm[site] for record in self.records]).sum(0)
        return errors / norms.clamp(min=1e-30)[..., None]

    def stretches(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Each observed call, by its place, with the calls of the range that are nearest to it."""
        first, end = self.calls
        observed = self.profile.observed_calls
        nearest = [
            min(range(len(observed)), key=lambda k: abs(observed[k] - call))
            for call in range(first, end)
        ]
        start = first
        for call in range(first, end):
            if call + 1 == end or nearest[call + 1 - first] != nearest[call - first]:
                yield nearest[call - first], (start, call + 1)
                start = call + 1

    def uniform(self, pattern: HeadPattern) -> Mapping[str, tuple[HeadPattern, ...]]:
        """The same pattern at every head of every site."""
        return {site: (pattern,) * self.profile.shapes[site].heads for site in self.sites}


class Rule(BaseModel):
    """A published rule with its settings.

    Attributes:
        dense_calls: share of the calls, at the start, with dense attention.
        dense_layers: share of the attention sites, the first ones, that are always dense.
        last_dense_calls: share of the calls, at the end, with dense attention.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense_calls: Share = 0.0
    dense_layers: Share = 0.0
    last_dense_calls: Share = 0.0

    def block(self, profile: Profile) -> Block:
        """Block sizes of the plan; the profile's unless the paper states its own."""
        return profile.block

    def order(self, profile: Profile) -> TokenOrder | None:
        """Order of the tokens; None leaves them in raster order."""
        return None

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """The choices for the calls of `ground`, contiguous."""
        raise NotImplementedError

    def ground(self, profile: Profile, records: Sequence[SeedRecord]) -> Ground:
        """The calls and sites after the warm-up.

        Raises:
            PlanError: no token grid.
        """
        if profile.layout is None:
            raise PlanError(
                "the profile knows no token grid, and the recipe is about one",
                remedy="State `layout` in the workload and profile again.",
            )
        calls = profile.sampler.calls
        first = math.ceil(self.dense_calls * calls)
        end = max(first, calls - math.ceil(self.last_dense_calls * calls))
        sites = [site.id for site in profile.model.sites if site.id in profile.shapes]
        skipped = math.ceil(self.dense_layers * len(sites))
        return Ground(profile, records, profile.layout, tuple(sites[skipped:]), (first, end))


def one_phase(ground: Ground, **choices: Mapping[str, Any]) -> tuple[Phase, ...]:
    """The same choices at all calls of the range."""
    return (Phase(calls=ground.calls, **choices),)


def needs_video(ground: Ground, paper: str) -> None:
    """Refuse an image model.

    Raises:
        PlanError: one frame.
    """
    if ground.layout.frames < 2:
        raise PlanError(f"{paper} is about videos, and the token grid has one frame")
