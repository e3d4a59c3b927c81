"""Selectors: which blocks all heads of an attention keep, decided from each call's data.

A selector is a rule over block scores and its amount; `keep` is a static pattern whose blocks are
always kept, text tokens with it (NABLA's static window under a dynamic choice). The scores and
rules are those of `ditopt.kernels.block_selection.reference`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ditopt.patterns.kinds import Band, HeadPattern

_Share = Annotated[float, Field(gt=0, le=1)]
_DIAGONAL = Band(window=0)


class _Selector(BaseModel):
    """What every selector has.

    Attributes:
        minimum: key blocks that a query block keeps at least.
        keep: blocks that are kept whatever they score; the diagonal by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    minimum: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    keep: HeadPattern = _DIAGONAL


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


PooledSelector = PooledTopK | PooledTopP | PooledThreshold

Selector = Annotated[PooledSelector | Hierarchical, Field(discriminator="kind")]
"""How an attention chooses its blocks; discriminated by `kind`, frozen and hashable."""
