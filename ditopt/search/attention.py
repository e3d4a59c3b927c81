"""Attention in the search: executors as alternatives of a site, patterns as options of heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.optimize import nnls

from ditopt.errors import ProfileError
from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.search.sensitivity import Alternative, Site, untouched
from ditopt.search.trajectory import between_observed, call_moves, pattern_energy

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule
    from ditopt.kernels.block_sparse_attention.reference_8bit import Arithmetic
    from ditopt.patterns import HeadPattern
    from ditopt.plan import Plan
    from ditopt.profiling.schema import (
        AttentionCost,
        AttentionOption,
        Profile,
        SeedRecord,
        SiteShape,
    )
    from ditopt.search.sensitivity import Choice, Floats

_REMAINDERS = ("drop", "mean")


class AttentionChoices:
    """What can be chosen at the profiled attention sites, and what a choice says in a plan.

    A site is dense as a whole, or one call of the block-sparse executor computes all its heads,
    each with one of the profile's options; dropped blocks add nothing (`drop`) or their mean
    (`mean`). Options belong to one token order, and a plan has one order. Where 8-bit products were
    timed and are faster, they are alternatives of dense attention.

    The error of a head is its squared error relative to the squared norm of its *site*, weighted
    as `trajectory` says, mean over seeds, over the number of sites.
    """

    def __init__(self, profile: Profile, records: Sequence[SeedRecord]) -> None:
        self._profile, self._records = profile, records
        self._between = between_observed(profile)
        self._densities: dict[SiteShape, Floats] = {}
        self._costs = (
            {cost.shape: cost for cost in profile.costs.attention} if profile.costs else {}
        )
        self._relative = {
            site: [relative_error(record, site) for record in records] for site in profile.shapes
        }
        self._rounding = {
            site: [relative_error(record, site, "arithmetic") for record in records]
            for site in profile.shapes
            if profile.arithmetics
        }
        for site, shape in profile.shapes.items():
            if shape not in self._costs:
                raise ProfileError(
                    f"profile.json: costs.attention: no cost for the shape of site {site!r}",
                    remedy="Profile into a new folder.",
                )

    @property
    def orders(self) -> list[int]:
        """Token orders that some option is in."""
        return sorted({0, *(option.order for option in self._profile.options)})

    def sites(
        self, order: int, first_call: int, schedule: CacheSchedule | None = None
    ) -> list[Site]:
        """The profiled sites, with errors over the calls from `first_call` on."""
        moves = [call_moves(record, first_call, schedule) for record in self._records]
        found = []
        for site, shape in self._profile.shapes.items():
            error = self._mean_error(site, moves)
            cost = self._costs[shape]
            alternatives = [untouched(shape.heads, cost.dense_ms, name="dense")]
            for remainder in _REMAINDERS:
                made = self._alternative(remainder, order, shape, cost, error)
                if made is not None:
                    alternatives.append(made)
            alternatives += self._in_8_bits(site, cost, moves)
            found.append(Site(site, "attention", first_call, tuple(alternatives)))
        return found

    @property
    def dense_ms(self) -> float:
        """One call of all profiled sites as they are."""
        return sum(self._costs[shape].dense_ms for shape in self._profile.shapes.values())

    def rules(
        self, choices: Mapping[str, Choice], sites: Sequence[Site]
    ) -> tuple[dict[str, tuple[HeadPattern, ...]], list[str]]:
        """Patterns by site for what was chosen, and the sites whose dropped blocks leave a mean."""
        rules, means = {}, []
        for site in sites:
            if site.id not in self._profile.shapes or site.id not in choices:
                continue
            number, picked = choices[site.id]
            alternative = site.alternatives[number]
            if alternative.name in self._profile.arithmetics:
                continue
            rules[site.id] = tuple(
                self._profile.options[alternative.options[k]].pattern for k in picked
            )
            if alternative.name == "mean":
                means.append(site.id)
        return rules, means

    def arithmetic(
        self, choices: Mapping[str, Choice], sites: Sequence[Site]
    ) -> dict[str, ArithmeticRule]:
        """The plan's rules for sites that multiply in 8 bits."""
        rules = {}
        for site in sites:
            if site.id in self._profile.shapes and site.id in choices:
                name = site.alternatives[choices[site.id][0]].name
                if name in self._profile.arithmetics:
                    rules[site.id] = ArithmeticRule.model_validate({"kind": name})
        return rules

    def density(self, choices: Mapping[str, Choice], sites: Sequence[Site]) -> float:
        """Kept fraction of blocks, mean over the heads of all profiled sites."""
        by_id = {site.id: site for site in sites}
        kept: list[float] = []
        for site, shape in self._profile.shapes.items():
            if site not in choices:
                kept += [1.0] * shape.heads
                continue
            number, picked = choices[site]
            if by_id[site].alternatives[number].name in self._profile.arithmetics:
                kept += [1.0] * shape.heads
                continue
            options = by_id[site].alternatives[number].options
            by_option = self._kept(shape)
            kept += [float(by_option[options[k]]) for k in picked]
        return sum(kept) / len(kept) if kept else 1.0

    def energy(self, plan: Plan, schedule: CacheSchedule | None) -> float:
        """The error of any plan whose patterns and 8-bit products the profile has measured.

        Where a site has both, rounding is taken as that of dense attention.

        Raises:
            ProfileError: it has not.
        """
        profile = self._profile
        order = profile.orders.index(plan.order) if plan.order in profile.orders else -1
        per_seed = np.zeros(len(self._records))
        for phase in plan.phases:
            for site, patterns in phase.attention.items():
                remainder = "mean" if site in phase.remainders else "drop"
                numbers = [self._option(pattern, order, remainder) for pattern in patterns]
                heads = np.arange(len(numbers))
                for s, record in enumerate(self._records):
                    moves = call_moves(record, phase.calls[0], schedule, phase.calls[1])
                    error = self._relative[site][s][:, heads, numbers]
                    per_seed[s] += float(pattern_energy(moves, self._between, error).sum())
            for site, rule in phase.arithmetic.items():
                number = self._arithmetic(rule.kind, site)
                for s, record in enumerate(self._records):
                    moves = call_moves(record, phase.calls[0], schedule, phase.calls[1])
                    error = self._rounding[site][s][:, :, number]
                    per_seed[s] += float(self._rounding_energy(moves, error).sum())
        return float(per_seed.mean()) / max(1, len(profile.shapes))

    def _alternative(
        self, remainder: str, order: int, shape: SiteShape, cost: AttentionCost, error: Floats
    ) -> Alternative | None:
        table = cost.sparse_ms if remainder == "drop" else cost.mean_ms
        numbers = [
            k for k, option in enumerate(self._profile.options) if _fits(option, order, remainder)
        ]
        if not table or all(self._profile.options[k].pattern.kind == "dense" for k in numbers):
            return None
        fixed_ms, full_ms = cost_line(table)
        kept = self._kept(shape)[numbers]
        return Alternative(
            name=remainder,
            fixed_ms=fixed_ms,
            bytes=0,
            option_ms=kept * full_ms / shape.heads,
            error=error[:, numbers],
            options=tuple(numbers),
        )

    def _in_8_bits(
        self, site: str, cost: AttentionCost, moves: Sequence[Floats]
    ) -> Iterator[Alternative]:
        """Dense attention in each arithmetic whose time is known and shorter."""
        for number, kind in enumerate(self._profile.arithmetics):
            ms = cost.arithmetic_ms.get(kind, math.inf)
            if ms < cost.dense_ms:
                by_seed = [
                    self._rounding_energy(move, relative[:, :, [number]])
                    for move, relative in zip(moves, self._rounding[site], strict=True)
                ]
                error: Floats = np.mean(by_seed, axis=0) / len(self._profile.shapes)
                yield Alternative(kind, ms, 0, np.zeros(1), error, (number,))

    def _rounding_energy(self, moves: Floats, error: Floats) -> Floats:
        """Of [O, ...] relative squared errors: rounding has another direction at every call."""
        energy: Floats = np.tensordot(moves**2 @ self._between, error, axes=1)
        return energy

    def _kept(self, shape: SiteShape) -> Floats:
        """[C] fraction of blocks that each option keeps, looked up once for a shape."""
        if shape not in self._densities:
            self._densities[shape] = np.array(self._profile.kept(shape))
        return self._densities[shape]

    def _mean_error(self, site: str, moves: Sequence[Floats]) -> Floats:
        per_seed = [
            pattern_energy(move, self._between, relative)
            for move, relative in zip(moves, self._relative[site], strict=True)
        ]
        error: Floats = np.mean(per_seed, axis=0) / len(self._profile.shapes)
        return error

    def _arithmetic(self, kind: Arithmetic, site: str) -> int:
        if kind in self._profile.arithmetics and site in self._rounding:
            return self._profile.arithmetics.index(kind)
        raise ProfileError(
            f"the profile has not measured {kind!r} at {site!r}",
            remedy="Profile again, or leave the arithmetic out.",
        )

    def _option(self, pattern: HeadPattern, order: int, remainder: str) -> int:
        for k, option in enumerate(self._profile.options):
            if option.pattern == pattern and _fits(option, order, remainder):
                return k
        raise ProfileError(
            f"the profile has not measured pattern {pattern.kind!r} as the plan uses it",
            remedy="Profile again, or leave the pattern out.",
        )


def relative_error(
    record: SeedRecord, site: str, of: Literal["patterns", "arithmetic"] = "patterns"
) -> Floats:
    """[O, H, C] of a site: squared error of a head over the squared norm of all heads."""
    norm = record.squared_norm[site].sum(dim=1)[:, None, None].clamp(min=1e-30)
    error = record.squared_error if of == "patterns" else record.arithmetic_error
    return np.asarray((error[site] / norm).numpy(), dtype=np.float64)


def cost_line(table: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares line through (density, ms): (fixed, added at density 1), both >= 0 ms."""
    kept, times = np.array(table, dtype=np.float64).T
    (fixed, added), _ = nnls(np.stack([np.ones_like(kept), kept], axis=1), times)
    return float(fixed), float(added)


def _fits(option: AttentionOption, order: int, remainder: str) -> bool:
    """Whether a head may have an option where a site has this order and remainder."""
    if option.pattern.kind == "dense":
        return True  # nothing is dropped, and attention does not change with the order
    if option.remainder != remainder:
        return False
    return option.order == order or (option.pattern.kind == "skip" and remainder == "drop")
