"""The rules that recipes may name, with their published settings as fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ditopt.caching import (
    CacheSchedule,
    Signals,
    first_block_cache,
    magcache,
    smoothcache,
    taylorseer,
    teacache,
    uniform,
)

Count = Annotated[int, Field(ge=1, le=10_000)]
Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def schedule(self, signals: Signals) -> CacheSchedule:
        """The calls that the rule would have run in full on the recorded runs."""
        raise NotImplementedError


class Uniform(_Rule):
    """See `ditopt.caching.uniform`."""

    kind: Literal["uniform"]
    interval: Count
    first: Count = 1
    last: bool = True

    def schedule(self, signals: Signals) -> CacheSchedule:
        """See `_Rule`."""
        return uniform(signals.calls, self.interval, first=self.first, last=self.last)


class TeaCache(_Rule):
    """See `ditopt.caching.teacache`; the polynomial is fitted to the recorded runs."""

    kind: Literal["teacache"]
    threshold: Threshold
    degree: Annotated[int, Field(ge=1, le=8)] = 4

    def schedule(self, signals: Signals) -> CacheSchedule:
        """See `_Rule`."""
        polynomial = signals.polynomial(self.degree)
        return teacache(signals.modulated, self.threshold, polynomial=polynomial)


class FirstBlockCache(_Rule):
    """See `ditopt.caching.first_block_cache`."""

    kind: Literal["first_block_cache"]
    threshold: Threshold

    def schedule(self, signals: Signals) -> CacheSchedule:
        """See `_Rule`."""
        return first_block_cache(signals.first_block, self.threshold)


class MagCache(_Rule):
    """See `ditopt.caching.magcache`."""

    kind: Literal["magcache"]
    threshold: Threshold
    max_skips: Count = 3
    retention: Annotated[float, Field(ge=0, le=1)] = 0.2

    def schedule(self, signals: Signals) -> CacheSchedule:
        """See `_Rule`."""
        return magcache(
            signals.magnitudes,
            self.threshold,
            max_skips=self.max_skips,
            retention=self.retention,
        )


class TaylorSeer(_Rule):
    """See `ditopt.caching.taylorseer`."""

    kind: Literal["taylorseer"]
    interval: Count
    order: Annotated[int, Field(ge=1, le=4)] = 1
    first: Count = 3
    last: bool = False

    def schedule(self, signals: Signals) -> CacheSchedule:
        """See `_Rule`."""
        return taylorseer(
            signals.calls, self.interval, order=self.order, first=self.first, last=self.last
        )


class SmoothCache(_Rule):
    """See `ditopt.caching.smoothcache`."""

    kind: Literal["smoothcache"]
    threshold: Threshold
    lookahead: Count = 3

    def schedule(self, signals: Signals) -> CacheSchedule:
        """See `_Rule`."""
        return smoothcache(signals.stack, self.threshold, lookahead=self.lookahead)


Rule = Annotated[
    Uniform | TeaCache | FirstBlockCache | MagCache | TaylorSeer | SmoothCache,
    Field(discriminator="kind"),
]
"""Any of them, by `kind`."""
