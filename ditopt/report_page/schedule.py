"""The steps of the sampling loop as a plan computes them: full calls, forecasts, phases."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditopt.plan import Phase, Plan


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        label: its number where the strip has room for it.
        full: whether the block stack runs.
        tip: what is told about it.
        row: JSON list of [full call, coefficient] that a forecast is made of, newest first.
    """

    label: str
    full: bool
    tip: str
    row: str


@dataclass(frozen=True)
class Schedule:
    """All calls of one guidance branch, and the phases below them as (calls, words)."""

    calls: tuple[Call, ...]
    phases: tuple[tuple[int, str], ...]
    full: int
    gate: str


def schedule(plan: Plan) -> Schedule:
    """The loop under a plan; without a cache every call is full."""
    sampler, cache = plan.sampler, plan.cache
    stride = 1 if sampler.calls <= 25 else 5
    calls = []
    for number in range(sampler.calls):
        lines = [f"call {number}"]
        if sampler.timesteps:
            lines[0] += f", timestep {sampler.timesteps[number]:g}"
        row: list[tuple[int, str]] = []
        if cache is None or number in cache.full:
            lines.append("full: every block runs")
        else:
            stored = [full for full in reversed(cache.full) if full < number]
            coefficients = cache.coefficients[number]
            row = [(s, f"{c:.2f}") for s, c in zip(stored, coefficients, strict=False)]
            lines.append("skipped: the blocks' residual is forecast")
            lines += [f"{c} × call {s}" for s, c in row]
        label = str(number) if number % stride == 0 else ""
        calls.append(Call(label, not row, "\n".join(lines), json.dumps(row)))
    phases = tuple((p.calls[1] - p.calls[0], _phase(p)) for p in plan.phases)
    return Schedule(tuple(calls), phases, sum(call.full for call in calls), _gate(plan))


def _phase(phase: Phase) -> str:
    start, stop = phase.calls
    said = []
    sparse = len(phase.attention) + len(phase.selectors)
    if sparse:
        said.append(f"{sparse} sparse attention{'s' if sparse > 1 else ''}")
    products = Counter(rule.kind for rule in phase.arithmetic.values())
    said += [f"{count} attention{'s' * (count > 1)} {kind}" for kind, count in products.items()]
    formats = Counter(rule.format for rule in phase.linear.values())
    said += [f"{count} layers {name}" for name, count in formats.items()]
    return f"calls {start} to {stop - 1}: {', '.join(said) or 'as the model is'}"


def _gate(plan: Plan) -> str:
    gate = None if plan.cache is None else plan.cache.gate
    if gate is None:
        return ""
    kind = gate.kind.replace("_", " ")
    return f"A gate ({kind}) runs a call in full where the change is above {gate.threshold:g}."
