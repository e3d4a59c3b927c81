"""What was measured and decided, as rows of tables: verifications, layers, decisions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ditopt.plan import Goal, Phase, Verification
    from ditopt.quantization import LinearRule
    from ditopt.report import Decision

_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
EQUAL_DB = 100.0
"""From here on results are equal up to rounding, and have no place on an axis of decibels."""

_DOTS_WIDTH = 140.0
_SHORT = {
    "fp8_row": ("fp8", "format8"),
    "int8_row": ("int8", "format8"),
    "int4_group": ("int4", "format4"),
    "twin_log": ("log4", "format4"),
    "int2_group": ("int2", "format2"),
    "twin_log2": ("log2", "format2"),
    "codebook": ("2-bit", "format2"),
}


@dataclass(frozen=True)
class Quality:
    """PSNR in dB over several seeds."""

    mean: float
    low: float
    p10: float

    @classmethod
    def of(cls, psnr_db: Sequence[float]) -> Quality:
        """Mean, minimum and 10th percentile."""
        values = np.asarray(psnr_db)
        return cls(float(values.mean()), float(values.min()), float(np.percentile(values, 10)))


@dataclass(frozen=True)
class Check:
    """One verification: `dots` are the seeds' places on a line of 140 units, `goal` the goal's."""

    record: Verification
    quality: Quality
    dots: tuple[float, ...]
    goal: float | None
    seeds: str


def checks(records: Sequence[Verification], goal: Goal | None) -> list[Check]:
    """Every verification of a plan on one scale of decibels."""
    wanted = None if goal is None else goal.min_psnr_db
    values = [min(value, EQUAL_DB) for record in records for value in record.psnr_db]
    values += [] if wanted is None else [wanted]
    if not values:
        return []
    low, span = min(values), max(max(values) - min(values), 1e-9)

    def place(value: float) -> float:
        return round(5 + (min(value, EQUAL_DB) - low) / span * (_DOTS_WIDTH - 10), 1)

    return [
        Check(
            record=record,
            quality=Quality.of(record.psnr_db),
            dots=tuple(place(value) for value in record.psnr_db),
            goal=None if wanted is None else place(wanted),
            seeds=_ranges(record.seeds),
        )
        for record in records
    ]


def _ranges(seeds: Sequence[int]) -> str:
    """`2000 to 2015` for a run of seeds, the numbers themselves otherwise."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


@dataclass(frozen=True)
class FormatTable:
    """Formats of linear layers: a row for each role, a column for each block.

    Attributes:
        name: the calls.
        columns: numbers of blocks; empty for layers outside of any.
        rows: role, and for each column (text, family, full words) or None where there is no layer.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str, str] | None, ...]], ...]


def formats(phases: Sequence[Phase], linears: Iterable[str]) -> list[FormatTable]:
    """The layers that a plan knows, by phase; phases with equal formats share one table."""
    roles: dict[str, dict[str, str]] = {}
    for layer in linears:
        match = _BLOCK.match(layer)
        role, block = (f"{match[1]}.*.{match[3]}", match[2]) if match else (layer, "")
        roles.setdefault(role, {})[block] = layer
    named = {block for row in roles.values() for block in row}
    blocks = sorted(named, key=lambda block: (not block, int(block or 0)))  # outside of any: last
    found = []
    for rules, equal in groupby(phases, key=lambda phase: phase.linear):
        if not rules:
            continue
        ranges = [phase.calls for phase in equal]
        rows = tuple(
            (role, tuple(_cell(row[b], rules) if b in row else None for b in blocks))
            for role, row in roles.items()
        )
        name = f"calls {ranges[0][0]} to {ranges[-1][1] - 1}"
        found.append(FormatTable(name, tuple(blocks), rows))
    return found


def _cell(layer: str, rules: dict[str, LinearRule]) -> tuple[str, str, str]:
    rule = rules.get(layer)
    if rule is None:
        return "·", "none", f"{layer}: left alone"
    short, family = _SHORT.get(rule.format, (rule.format, "format"))
    said = (rule.format, rule.activation, rule.transform)
    words = ", ".join(word for word in said if word != "none") or "none"
    simulated = ", simulated" if rule.simulate else ""
    return short, family, f"{layer}: {words}{simulated}"


@dataclass(frozen=True)
class Told:
    """Decisions that say the same about several sites."""

    rule: str
    applied: bool
    reason: str
    sites: tuple[str, ...]


def grouped(decisions: Iterable[Decision]) -> list[Told]:
    """Decisions of one rule with one reason together, in the order of their first site."""
    found: dict[tuple[str, bool, str], list[str]] = {}
    for decision in decisions:
        sites = found.setdefault((decision.rule, decision.applied, decision.reason), [])
        if decision.site not in sites:
            sites.append(decision.site)
    return [
        Told(rule, applied, reason, tuple(sites))
        for (rule, applied, reason), sites in found.items()
    ]
