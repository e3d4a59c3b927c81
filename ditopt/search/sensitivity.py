"""One interface for everything that can be chosen: sites, their alternatives, and what each costs.

Attention (dense, sparse, sparse with block means; in each token order), the number formats of
linear layers, and cache schedules all become a `Site`. The solver (`assignment`) sees nothing else.

What a choice costs is a time, an error and a number of bytes; all three add up over sites. Errors
are energies in units of the sampled tensor squared, before the gains of `calibration.ErrorModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

Technique = Literal["attention", "linears", "cache"]
TECHNIQUES: tuple[Technique, ...] = ("attention", "linears", "cache")

Choice = tuple[int, tuple[int, ...]]
"""Number of a site's alternative, and one option of it for each head."""

_PRICES = 128
"""Prices of a site's curves: from prohibitive to free, a factor of about 1.3 apart."""

_BLOCK = re.compile(r"^(.*?\d+)(\..*)$")


@dataclass(frozen=True)
class Alternative:
    """One way to compute a site: an executor or a number format, with options for each head.

    Attributes:
        name: what runs; blocks whose sites run the same share one program.
        fixed_ms: time that does not depend on the options.
        bytes: memory that it keeps (weights, residuals).
        option_ms: [C] further time of one head, by option.
        error: [H, C] energy of one head's error, by option.
        options: [C] the numbers that the profile gives to the options.
    """

    name: str
    fixed_ms: float
    bytes: int
    option_ms: Floats
    error: Floats
    options: tuple[int, ...]


@dataclass(frozen=True)
class Curves:
    """For each alternative the best choice of its heads along a grid of prices of error.

    Attributes:
        prices: [L] milliseconds that a unit of error is worth, falling.
        ms, error: [A, L] of all heads together, what is fixed included.
        bytes: [A].
    """

    prices: Floats
    ms: Floats
    error: Floats
    bytes: Floats

    @cached_property
    def rising(self) -> Floats:
        """[L] minus the prices, to search in."""
        return -self.prices

    @classmethod
    def of(cls, alternatives: Sequence[Alternative]) -> Curves:
        """One choice per head, alternative and price."""
        positive = [a.error[a.error > 0] for a in alternatives if a.error.any()]
        least = min((float(e.min()) for e in positive), default=1.0)
        total = sum(float(e.sum()) for e in positive) or 1.0
        longest = max(float(a.fixed_ms + a.option_ms.max()) for a in alternatives) or 1.0
        prices = np.geomspace(1e3 * longest / least, 1e-6 * longest / total, _PRICES)
        sums = [_best_sums(a, prices) for a in alternatives]
        return cls(
            prices,
            np.stack([ms for ms, _ in sums]),
            np.stack([error for _, error in sums]),
            np.array([float(a.bytes) for a in alternatives]),
        )

    def scaled(self, calls: float, gain: float) -> Curves:
        """With times of `calls` calls together and errors times `gain`."""
        return Curves(self.prices * (calls / gain), self.ms * calls, self.error * gain, self.bytes)

    def at(self, price: float) -> tuple[Floats, Floats]:
        """Milliseconds and error [A] at a price of the grid, the next lower one."""
        k = min(int(self.rising.searchsorted(-price)), len(self.prices) - 1)
        return self.ms[:, k], self.error[:, k]


def _best_sums(alternative: Alternative, prices: Floats) -> tuple[Floats, Floats]:
    """Milliseconds and error [L] of all heads, each with its best option at each price."""
    option_ms, error = alternative.option_ms, alternative.error
    priced = option_ms[None, None] + prices[:, None, None] * error[None]
    chosen = priced.argmin(axis=2)
    heads = np.arange(error.shape[0])[None]
    ms = alternative.fixed_ms + option_ms[chosen].sum(axis=1)
    return ms, error[heads, chosen].sum(axis=1)


@dataclass(frozen=True)
class Site:
    """A place in the model where one alternative is chosen, and an option for each of its heads.

    Attributes:
        id: attention site, group of linear layers, or the block stack.
        technique: whose gain its errors get.
        first_call: the choice holds from this call on; before it, alternative 0 does.
        alternatives: number 0 leaves the site as it is, without any error.
    """

    id: str
    technique: Technique
    first_call: int
    alternatives: tuple[Alternative, ...]

    @property
    def heads(self) -> int:
        """Number of heads, equal for all alternatives."""
        return int(self.alternatives[0].error.shape[0])

    @property
    def block(self) -> str:
        """Path of the transformer block that the site lies in; its own id where there is none."""
        found = _BLOCK.match(self.id)
        return found[1] if found else self.id

    @property
    def family(self) -> str:
        """What blocks of one kind have in common: their path without its number."""
        return self.block.rstrip("0123456789")

    @property
    def slot(self) -> str:
        """The site's name within its block: equal for the same place of equal blocks."""
        found = _BLOCK.match(self.id)
        return found[2].replace(found[1], "") if found else ""

    @property
    def as_is(self) -> Choice:
        """The choice that changes nothing."""
        return 0, (0,) * self.heads

    @cached_property
    def curves(self) -> Curves:
        """What heads choose at each price of error."""
        return Curves.of(self.alternatives)

    def scaled(self, calls: float, gain: float) -> Site:
        """The site with times of `calls` calls together and errors times `gain`; both above 0."""
        made = replace(
            self,
            alternatives=tuple(
                replace(
                    a,
                    fixed_ms=a.fixed_ms * calls,
                    option_ms=a.option_ms * calls,
                    error=a.error * gain,
                )
                for a in self.alternatives
            ),
        )
        made.__dict__["curves"] = self.curves.scaled(calls, gain)
        return made

    def in_time(self, share: float) -> Site:
        """The site with all times multiplied."""
        alternatives = (
            replace(a, fixed_ms=a.fixed_ms * share, option_ms=a.option_ms * share)
            for a in self.alternatives
        )
        return replace(self, alternatives=tuple(alternatives))

    def cost(self, choice: Choice) -> tuple[float, float, int]:
        """Milliseconds, error and bytes of a choice."""
        alternative, index = self.alternatives[choice[0]], np.array(choice[1])
        ms = alternative.fixed_ms + float(alternative.option_ms[index].sum())
        error = float(alternative.error[np.arange(len(index)), index].sum())
        return ms, error, alternative.bytes


def untouched(heads: int, ms: float, size: int = 0, name: str = "as is") -> Alternative:
    """Alternative 0 of a site: its time and bytes, no error."""
    return Alternative(name, ms, size, np.zeros(1), np.zeros((heads, 1)), (0,))


Program = tuple[object, ...]
"""What decides the compiled body of a block: its kind, and the alternatives of its sites."""

Column = tuple[int, ...]
"""Alternatives of one block's sites, in the order of their slots."""


@dataclass(frozen=True)
class Family:
    """Blocks of one kind: the same sites, which may share programs.

    Attributes:
        blocks: for each block its sites, in the order of their slots.
        starts: calls at which phases begin.
    """

    blocks: tuple[tuple[Site, ...], ...]
    starts: tuple[int, ...]

    def programs(self, columns: Iterable[Column]) -> set[Program]:
        """The different programs that blocks with these alternatives need, over all phases.

        Block lists, patterns and scales are inputs of a program. Before a site's first call its
        alternative 0 runs.
        """
        members = self.blocks[0]
        return {
            (
                members[0].family,
                *(
                    site.alternatives[number if site.first_call <= start else 0].name
                    for site, number in zip(members, column, strict=True)
                ),
            )
            for column in columns
            for start in self.starts
        }


def families(sites: Sequence[Site]) -> dict[str, Family]:
    """The kinds of blocks."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        blocks.setdefault(site.block, []).append(site)
    alike: dict[str, list[tuple[Site, ...]]] = {}
    for members in blocks.values():
        ordered = tuple(sorted(members, key=lambda site: site.slot))
        names = [(s.slot, s.first_call, [a.name for a in s.alternatives]) for s in ordered]
        alike.setdefault(f"{ordered[0].family} {names}", []).append(ordered)
    starts = tuple(sorted({0, *(site.first_call for site in sites)}))
    return {key: Family(tuple(members), starts) for key, members in alike.items()}


def program_count(kinds: Mapping[str, Family], choices: Mapping[str, Choice]) -> int:
    """Number of different block programs that an assignment needs."""
    return sum(
        len(
            family.programs(
                tuple(choices.get(site.id, site.as_is)[0] for site in block)
                for block in family.blocks
            )
        )
        for family in kinds.values()
    )
