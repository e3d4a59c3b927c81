"""Selectors: which blocks all heads of an attention keep, decided from each call's data.

Most are a rule over block scores and its amount; `keep` is a static pattern whose blocks are always
kept, text tokens with it (NABLA's static window under a dynamic choice). Scores and rules are those
of `ditopt.kernels.block_selection`. Two choose an order of tokens for each head as well.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ditopt.patterns.kinds import Band, HeadPattern

_Share = Annotated[float, Field(gt=0, le=1)]
_DIAGONAL = Band(window=0)


Scores = Literal["pooled", "mass"]
"""Of blocks: mean query times mean key, or the exact softmax mass."""


class _Selector(BaseModel):
    """What every selector by block scores has.

    Attributes:
        minimum: key blocks that a query block keeps at least.
        keep: blocks that are kept whatever they score; the diagonal by default.
        refresh: computed steps of one run and phase that a choice serves; 1 chooses at every one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    minimum: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    keep: HeadPattern = _DIAGONAL
    refresh: Annotated[int, Field(ge=1, le=10_000)] = 1

    @property
    def scores(self) -> Scores:
        """What the rule looks at."""
        return "pooled"


class PooledTopK(_Selector):
    """The best blocks by pooled queries and keys: the share `density` of them (VSA, SLA)."""

    kind: Literal["pooled_top_k"] = "pooled_top_k"
    density: _Share

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount of the rule."""
        return "top_k", self.density


class PooledTopP(_Selector):
    """The fewest blocks that hold the share `mass` of the pooled softmax (SpargeAttn, BSA)."""

    kind: Literal["pooled_top_p"] = "pooled_top_p"
    mass: _Share

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount of the rule."""
        return "top_p", self.mass


class PooledThreshold(_Selector):
    """Blocks that score `deviations` standard deviations above their row's mean (Sol-Attn)."""

    kind: Literal["pooled_threshold"] = "pooled_threshold"
    deviations: Annotated[float, Field(ge=-8, le=8, allow_inf_nan=False)]

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount of the rule."""
        return "threshold", self.deviations


class PooledPercentile(_Selector):
    """The share `density` of a head's blocks by one threshold for the head (DraftAttention)."""

    kind: Literal["pooled_percentile"] = "pooled_percentile"
    density: _Share

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount of the rule."""
        return "percentile", self.density


class ExactTopK(_Selector):
    """The best blocks by their exact softmax mass (AdaSpa, 2502.21079).

    Choosing costs one and a half dense attentions: it pays only where a choice serves many steps.

    Attributes:
        density: share of the blocks, on average over the heads.
        adaptive: heads whose best blocks hold most of the mass give budget to those that hold
            least (`block_selection.whole_heads`).
    """

    kind: Literal["exact_top_k"] = "exact_top_k"
    density: _Share
    adaptive: bool = False

    @property
    def scores(self) -> Scores:
        """What the rule looks at."""
        return "mass"

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount of the rule."""
        return ("adaptive" if self.adaptive else "top_k"), self.density


class ExactTopP(_Selector):
    """The fewest blocks that hold the share `mass` of the softmax; cost as for `ExactTopK`."""

    kind: Literal["exact_top_p"] = "exact_top_p"
    mass: _Share

    @property
    def scores(self) -> Scores:
        """What the rule looks at."""
        return "mass"

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount of the rule."""
        return "top_p", self.mass


class Clusters(BaseModel):
    """Tokens sorted by k-means clusters of each head; clusters of keys by top-p (SVG2, 2505.18875).

    A sequence of grid tokens alone. Centroids of a step are where the next step of the run starts.

    Attributes:
        queries: clusters of queries.
        keys: clusters of keys.
        mass: share of the softmax over clusters that is kept.
        least: share of the clusters of keys that are kept at least.
        first: iterations of k-means in a run's first step.
        later: iterations in the steps after it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["clusters"] = "clusters"
    queries: Annotated[int, Field(ge=1, le=1 << 16)] = 100
    keys: Annotated[int, Field(ge=1, le=1 << 16)] = 500
    mass: _Share = 0.9
    least: Annotated[float, Field(ge=0, le=1)] = 0.1
    first: Annotated[int, Field(ge=0, le=1000)] = 50
    later: Annotated[int, Field(ge=0, le=1000)] = 2


class TwoMasks(BaseModel):
    """Each head takes one pattern over the tokens frame by frame, or place by place (SVG).

    Sampled queries decide at every call which of the two errs less (Sparse VideoGen, 2502.01776);
    heads that choose places (temporal heads) have their tokens moved there and back.

    Attributes:
        pattern: what is kept in either order; text is always kept.
        samples: queries that vote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["two_masks"] = "two_masks"
    pattern: HeadPattern
    samples: Annotated[int, Field(ge=1, le=1 << 16)] = 64


class Hierarchical(BaseModel):
    """Blocks of 16 tokens by a search from coarse to fine (LLSA, 2512.16615), for long sequences.

    Cost N log N; the plan's block sizes do not apply, and text tokens have no place in it.

    Attributes:
        top_k: blocks that are kept at each level.
        coarse: whether pooled tokens stand for what is left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["hierarchical"] = "hierarchical"
    top_k: Literal[1, 2, 4, 8, 16] = 8
    coarse: bool = True


BlockSelector = PooledTopK | PooledTopP | PooledThreshold | PooledPercentile | ExactTopK | ExactTopP
"""Selectors by block scores."""

OrderSelector = Clusters | TwoMasks
"""Selectors that choose an order of tokens for each head as well."""

Selector = Annotated[
    BlockSelector | OrderSelector | Hierarchical,
    Field(discriminator="kind"),
]
"""How an attention chooses its blocks; discriminated by `kind`, frozen and hashable."""
