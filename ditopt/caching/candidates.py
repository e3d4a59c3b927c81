"""Candidate schedules: one recording, read by several rules.

No one error measure ranks schedules as real sampling does: what a sampler makes of an error depends
on the call, and forecasts err together. So candidates are drawn by several rules, and sampling
chooses (`choose`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.caching.baselines import evenly_spaced, relative_change
from ditopt.caching.cache_schedule import CacheSchedule, schedule_error
from ditopt.caching.fit import fit_rows
from ditopt.caching.schedule_search import search_schedules

_TINY = 1e-30


@dataclass(frozen=True)
class Rule:
    """One way to find the full calls for each budget.

    Attributes:
        name: for records.
        weight: energy of each call's residual -> [T] weight of its squared error.
        history: of the forecasts that errors are counted of; 1 spreads full calls by how much the
            residual drifts between them, whatever rows will be fitted.
        first: calls at the beginning that are always full.
        last: whether the last call is always full.
    """

    name: str
    weight: Callable[[Tensor], Tensor]
    history: int
    first: int = 1
    last: bool = True


def _absolute(energy: Tensor) -> Tensor:
    return torch.ones_like(energy)


def _relative(energy: Tensor) -> Tensor:
    return 1 / energy.clamp(min=1e-12 * float(energy.max()) + _TINY)


def _between(energy: Tensor) -> Tensor:
    return _relative(energy).sqrt()


RULES = (
    Rule("drift", _absolute, history=1),
    Rule("drift, between", _between, history=1),
    Rule("relative", _relative, history=2),
    Rule("drift, relative", _relative, history=1, last=False),
    Rule("between", _between, history=2),
    Rule("absolute", _absolute, history=2, first=2),
)
"""In the order in which they have proved themselves on the embedded video model."""


def draw_calls(
    gram: Tensor, *, steps: Sequence[float] | None = None
) -> dict[int, list[tuple[int, ...]]]:
    """Number of full calls K -> different choices of them, most promising rule first.

    Args:
        gram: [T, T] inner products of residuals.
        steps: [T] squared step of the sampler at each call; adds the rule that weighs by it.

    Returns:
        At least one choice for each K from 1 to T; `fitted` makes a schedule of it.
    """
    calls = gram.shape[0]
    gram = gram.double()
    found: dict[int, list[tuple[int, ...]]] = {k: [] for k in range(1, calls + 1)}
    choices = [
        proposed.full
        for rule in (*RULES[:1], *_step_rules(steps), *RULES[1:])
        for proposed in _by_rule(gram, rule)
    ]
    for full in (*choices, *_drifting(gram)):
        if full not in found[len(full)]:
            found[len(full)].append(full)
    # Fewer calls than any rule forces: evenly spaced.
    return {k: some or [evenly_spaced(calls, k).full] for k, some in found.items()}


def _by_rule(gram: Tensor, rule: Rule) -> list[CacheSchedule]:
    calls = gram.shape[0]
    forced = {*range(min(rule.first, calls)), *([calls - 1] if rule.last else [])}
    weights = rule.weight(gram.diagonal()).tolist()
    return search_schedules(gram, weights=weights, forced=forced, history=rule.history)


def fitted(gram: Tensor, full: Sequence[int], history: int = 2) -> CacheSchedule:
    """These full calls with fitted rows and their `ranking_error`."""
    schedule = CacheSchedule(gram.shape[0], tuple(full), fit_rows(gram, full, history=history))
    error = ranking_error(gram, schedule)
    return CacheSchedule(schedule.calls, schedule.full, schedule.rows, error)


def ranking_error(gram: Tensor, schedule: CacheSchedule) -> float:
    """`schedule_error` with squared errors relative to each call's own residual.

    Early calls move the sample little, but what goes wrong there is carried through all later ones.
    """
    return schedule_error(gram, schedule, _relative(gram.diagonal()).tolist())


def _step_rules(steps: Sequence[float] | None) -> tuple[Rule, ...]:
    if steps is None:
        return ()
    weights = torch.as_tensor(steps, dtype=torch.float64)
    return (Rule("step", lambda _: weights, history=2),)


def _drifting(gram: Tensor) -> list[tuple[int, ...]]:
    """Full as soon as the residual has changed by a threshold since the last full call.

    First-Block Cache's rule on the residual of the whole stack, for thresholds of every size.
    """
    change = relative_change(gram)
    found: dict[int, tuple[int, ...]] = {}
    for threshold in torch.logspace(-2.5, 0.7, 65).tolist():
        full = [0]
        for call in range(1, gram.shape[0]):
            if not float(change[full[-1], call]) < threshold:
                full.append(call)
        found.setdefault(len(full), tuple(full))
    return list(found.values())
