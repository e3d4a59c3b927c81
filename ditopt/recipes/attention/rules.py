"""The rules that attention recipes may name, with their published settings as fields."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ditopt.errors import PlanError
from ditopt.patterns import (
    Band,
    Circle,
    Clusters,
    ExactTopK,
    FrameTile,
    HeadPattern,
    PooledPercentile,
    PooledThreshold,
    PooledTopK,
    Stripe,
    TwoMasks,
    Window,
)
from ditopt.plan import Block, Phase
from ditopt.plan.schema import MeanRemainder
from ditopt.recipes.attention.base import Density, Ground, Rule, Share, needs_video, one_phase
from ditopt.token_order import Morton, Tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from ditopt.profiling.schema import Profile
    from ditopt.token_order import TokenOrder

Count = Annotated[int, Field(ge=1, le=1 << 16)]
_LONG = 10_000  # computed steps: a choice serves its whole phase


def _block(size: int) -> Block:
    return Block(q=size, k=size)


def _cube(profile: Profile) -> Tile:
    """Tiles of 64 tokens, cubes for a video and squares for a picture (VSA)."""
    frames = profile.layout.frames if profile.layout is not None else 1
    return Tile(frames=4, rows=4, cols=4) if frames > 1 else Tile(rows=8, cols=8)


class UniformWindow(Rule):
    """One 3D window for all heads; shares of the grid's axes."""

    kind: Literal["uniform_window"]
    time: Density
    space: Density

    def block(self, profile: Profile) -> Block:
        """As large as a tile of the order."""
        return _block(64)

    def order(self, profile: Profile) -> TokenOrder | None:
        """Tiles, so that windows are compact."""
        return _cube(profile)

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        grid = ground.layout
        window = Window(
            frames=max(1, round(self.time * grid.frames)),
            rows=max(1, round(self.space * grid.height)),
            cols=max(1, round(self.space * grid.width)),
        )
        return one_phase(ground, attention=ground.uniform(window))


class SparseVDiT(Rule):
    """For each head and call the mode with the least error plus density, or dense.

    ``L = error + weight * density`` over skip, diagonal, multi-diagonal and stripe, each of one
    size; dense where every L exceeds `threshold`.
    """

    kind: Literal["sparse_vdit"]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    density: Density = 0.25

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        profile = ground.profile
        dense = ground.measured(_of("dense"))[0]
        chosen: dict[int, dict[str, tuple[HeadPattern, ...]]] = {}
        for site in ground.sites:
            kept = profile.kept(profile.shapes[site])
            modes = self._modes(ground, kept)
            errors = ground.relative_errors(site)
            for place in range(errors.shape[0]):
                patterns = []
                for head in errors[place].tolist():
                    losses = {mode: head[mode] + self.weight * kept[mode] for mode in modes}
                    best = min(losses, key=losses.__getitem__)
                    option = best if losses[best] <= self.threshold else dense
                    patterns.append(profile.options[option].pattern)
                chosen.setdefault(place, {})[site] = tuple(patterns)
        return tuple(
            Phase(calls=calls, attention=_sparse(chosen.get(place, {})))
            for place, calls in ground.stretches()
        )

    def _modes(self, ground: Ground, kept: tuple[float, ...]) -> list[int]:
        """Of each mode the measured option whose density is nearest to `density`."""
        found: list[int] = []
        for kinds in (("skip",), ("band", "window"), ("multi_diagonal",), ("stripe",)):
            options = ground.measured(_of(*kinds))
            found += sorted(options, key=lambda option: abs(kept[option] - self.density))[:1]
        if not found:
            raise PlanError("the profile measured none of the recipe's patterns")
        return found


class FrameTiles(Rule):
    """For each layer the sparsest frame mask whose error stays within a budget."""

    kind: Literal["frame_tiles"]
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        needs_video(ground, "Efficient-vDiT")
        profile, masks = ground.profile, ground.measured(_is_frame_mask)
        if not masks:
            raise PlanError("the profile measured no frame tiles, which the recipe chooses from")
        chosen: dict[str, tuple[HeadPattern, ...]] = {}
        for site in ground.sites:
            kept = profile.kept(profile.shapes[site])
            error = ground.relative_errors(site).mean((0, 1)).sqrt().tolist()
            allowed = [mask for mask in masks if error[mask] <= self.budget]
            if allowed:
                best = profile.options[min(allowed, key=lambda mask: kept[mask])].pattern
                chosen[site] = (best,) * profile.shapes[site].heads
        return one_phase(ground, attention=chosen)


class Disk(Rule):
    """A disk around each query on the picture's grid."""

    kind: Literal["disk"]
    radius: Count

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        disk = Circle(radius=self.radius, frames=ground.layout.frames)
        return one_phase(ground, attention=ground.uniform(disk))


class OnlineTwoMasks(Rule):
    """A band frame by frame or place by place, voted by sampled queries at every call."""

    kind: Literal["two_masks"]
    density: Density
    samples: Count = 64

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`; the band's width from the density as the released code computes it."""
        needs_video(ground, "Sparse VideoGen")
        chosen = {}
        for site in ground.sites:
            tokens = ground.profile.shapes[site].tokens
            text = max(0, tokens - ground.layout.tokens)
            grid_share = min(1.0, max(0.0, self.density - 2 * text / tokens))
            band = Band(window=round(tokens * (1 - math.sqrt(1 - grid_share))))
            chosen[site] = TwoMasks(pattern=band, samples=self.samples)
        return one_phase(ground, selectors=chosen)


class ExactMass(Rule):
    """Blocks by their exact mass, searched at few calls, budgets by head."""

    kind: Literal["exact_mass"]
    density: Density
    searches: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.2, 0.6)
    adaptive: bool = True

    def block(self, profile: Profile) -> Block:
        """The paper's."""
        return _block(64)

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`; one phase for each search, which serves all of it."""
        selector = ExactTopK(density=self.density, adaptive=self.adaptive, refresh=_LONG)
        first, end = ground.calls
        calls = ground.profile.sampler.calls
        starts = {first, *(round(share * calls) for share in self.searches)}
        begins = sorted(start for start in starts if first <= start < end)
        return tuple(
            Phase(calls=(start, stop), selectors=dict.fromkeys(ground.sites, selector))
            for start, stop in zip(begins, [*begins[1:], end], strict=True)
        )


class PooledPatches(Rule):
    """Patches of a frame as blocks; one percentile of the pooled map for each head."""

    kind: Literal["pooled_patches"]
    density: Density
    rows: Count = 8
    cols: Count = 16

    def block(self, profile: Profile) -> Block:
        """One patch."""
        return _block(self.rows * self.cols)

    def order(self, profile: Profile) -> TokenOrder | None:
        """Patch after patch."""
        return Tile(rows=self.rows, cols=self.cols)

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        selector = PooledPercentile(density=self.density)
        return one_phase(ground, selectors=dict.fromkeys(ground.sites, selector))


class PooledCubes(Rule):
    """Cubes of tokens as blocks; the best share of them by pooled scores for each query cube."""

    kind: Literal["pooled_cubes"]
    density: Density

    def block(self, profile: Profile) -> Block:
        """One cube."""
        return _block(64)

    def order(self, profile: Profile) -> TokenOrder | None:
        """Cube after cube."""
        return _cube(profile)

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        selector = PooledTopK(density=self.density)
        return one_phase(ground, selectors=dict.fromkeys(ground.sites, selector))


class ThresholdWithMeans(Rule):
    """Blocks that score far above their row's mean; the means of the others stand for them."""

    kind: Literal["threshold_with_means"]
    deviations: Annotated[float, Field(ge=-8, le=8, allow_inf_nan=False)]

    def block(self, profile: Profile) -> Block:
        """The paper's."""
        return _block(64)

    def order(self, profile: Profile) -> TokenOrder | None:
        """Z-order, so that blocks are compact."""
        return Morton()

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        selector = PooledThreshold(deviations=self.deviations)
        return one_phase(
            ground,
            selectors=dict.fromkeys(ground.sites, selector),
            remainders=dict.fromkeys(ground.sites, MeanRemainder()),
        )


class ClusteredTokens(Rule):
    """Tokens sorted by k-means clusters; clusters of keys by top-p."""

    kind: Literal["clustered_tokens"]
    mass: Density = 0.9
    queries: Count = 100
    keys: Count = 500
    least: Share = 0.1
    first: Count = 50
    later: Count = 2

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """See `Rule`."""
        settings = self.model_dump(include={"mass", "queries", "keys", "least", "first", "later"})
        return one_phase(ground, selectors=dict.fromkeys(ground.sites, Clusters(**settings)))


def _of(*kinds: str) -> Callable[[HeadPattern], bool]:
    return lambda pattern: pattern.kind in kinds


def _is_frame_mask(pattern: HeadPattern) -> bool:
    """Own frame and reference frames; of equal masks a profile may measure either kind."""
    if isinstance(pattern, Stripe):
        return pattern.unit == "frame" and pattern.reach == 0
    return isinstance(pattern, FrameTile)


def _sparse(
    chosen: dict[str, tuple[HeadPattern, ...]],
) -> dict[str, tuple[HeadPattern, ...]]:
    """Without the sites at which every head is dense."""
    return {site: ps for site, ps in chosen.items() if any(p.kind != "dense" for p in ps)}


AttentionRule = Annotated[
    UniformWindow
    | SparseVDiT
    | FrameTiles
    | Disk
    | OnlineTwoMasks
    | ExactMass
    | PooledPatches
    | PooledCubes
    | ThresholdWithMeans
    | ClusteredTokens,
    Field(discriminator="kind"),
]
