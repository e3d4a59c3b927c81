"""`StepSchedule`: which calls of the model run in full and how the others are forecast."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from ditopt.errors import PlanError

if TYPE_CHECKING:
    from ditopt.runtime.gate import Gate

# A forecast amplifies the noise of stored residuals by up to sum |c|. Published tables stay below 6
# (Taylor order 1 over a gap of 3 to 5); a row beyond this bound is a corrupted plan, not a choice.
MAX_GAIN = 32.0

# Timesteps often pass through bfloat16, whose rounding error is 2^-9 relative.
_TIMESTEP_TOLERANCE = 2.0**-8


@dataclass(frozen=True)
class StepSchedule:
    """What happens at each of the T calls that one guidance branch makes in one sampling run.

    A skip call replaces the output of the block stack by `base + sum_j c[t, j] * R_j`, with R_j the
    residual (output minus input of the stack) of the j-th newest full call before t. Reuse, Taylor,
    Newton and fitted forecasts are all rows of this one table (TaylorSeer, arXiv 2503.06923; L2P,
    arXiv 2604.26365).

    Attributes:
        full: [T] whether the call runs the block stack.
        coefficients: [T][m] one row per call, newest full call first; rows of skip calls sum to 1,
            rows of full calls are empty or ignored.
        timesteps: [T] value of the model's timestep input at each call, or None when unknown. A
            sampler with two evaluations per step (Heun) has two calls per step.
        phases: half-open ranges of calls, contiguous from 0 to T. Phase 0 must be the most careful
            one: it also serves calls whose position in the run is unknown.
        branches: how many guidance branches call the model in turn (2 for sequential
            classifier-free guidance, 1 when the halves are batched).
        gate: may run skip calls in full.
        keeps_lists: some selector's choice serves several computed calls of a branch.
    """

    full: tuple[bool, ...]
    coefficients: tuple[tuple[float, ...], ...] = ()
    timesteps: tuple[float, ...] | None = None
    phases: tuple[tuple[int, int], ...] = ()
    branches: int = 1
    gate: Gate | None = None
    keeps_lists: bool = False

    def __post_init__(self) -> None:
        if not self.coefficients:
            object.__setattr__(self, "coefficients", ((),) * len(self.full))
        if not self.phases:
            object.__setattr__(self, "phases", ((0, len(self.full)),))
        self._check_lengths()
        self._check_phases()
        self._check_rows()

    @classmethod
    def build(
        cls,
        calls: int,
        full: Sequence[int],
        coefficients: Mapping[int, Sequence[float]],
        *,
        timesteps: Sequence[float] | None = None,
        phases: Sequence[tuple[int, int]] = (),
        branches: int = 1,
        gate: Gate | None = None,
        keeps_lists: bool = False,
    ) -> StepSchedule:
        """The schedule as a plan writes it: indices of full calls and one row per skip call."""
        stray = sorted({*full, *coefficients} - set(range(calls)))
        if stray:
            raise PlanError(f"the cache schedule names call {stray[0]}, expected 0 to {calls - 1}")
        both = sorted(set(full) & set(coefficients))
        if both:
            raise PlanError(f"call {both[0]} is full and also has forecast coefficients")
        running = set(full)
        return cls(
            full=tuple(call in running for call in range(calls)),
            coefficients=tuple(tuple(coefficients.get(call, ())) for call in range(calls)),
            timesteps=None if timesteps is None else tuple(timesteps),
            phases=tuple((first, end) for first, end in phases),
            branches=branches,
            gate=gate,
            keeps_lists=keeps_lists,
        )

    @property
    def calls(self) -> int:
        """T, the number of calls per guidance branch."""
        return len(self.full)

    @property
    def history(self) -> int:
        """m, the length of the longest row."""
        return max(len(row) for row in self.coefficients)

    @property
    def skips(self) -> bool:
        """Whether any call is forecast."""
        return not all(self.full)

    @property
    def trivial(self) -> bool:
        """Whether every call does the same, so that its position in the run does not matter."""
        return not (self.skips or self.keeps_lists or len(self.phases) > 1)

    @cached_property
    def sources(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """[T] the (full call, coefficient) pairs that a skip call combines, zeros left out."""
        newest: list[int] = []
        table: list[tuple[tuple[int, float], ...]] = []
        for call, runs in enumerate(self.full):
            if runs:
                table.append(())
                newest.insert(0, call)
            else:
                row = zip(newest, self.coefficients[call], strict=False)
                table.append(tuple((source, c) for source, c in row if c != 0.0))
        return tuple(table)

    @cached_property
    def last_use(self) -> dict[int, int]:
        """The last skip call that reads each full call's residual; unread ones are absent."""
        return {source: call for call, row in enumerate(self.sources) for source, _ in row}

    def full_before(self, call: int) -> tuple[int, ...]:
        """The calls before `call` that the plan runs in full, newest first."""
        return tuple(earlier for earlier in range(call - 1, -1, -1) if self.full[earlier])

    def stores(self, call: int | None) -> bool:
        """Whether a call's residual, if it runs in full, is read by a later one."""
        if call is None or self.gate is None:
            return call in self.last_use
        return call < self._last_skip

    def outdated(self, stored: Collection[int], call: int) -> list[int]:
        """Of the calls whose residuals are stored, those that nothing reads after `call`."""
        if self.gate is None:
            return [source for source in stored if self.last_use[source] <= call]
        kept = self.kept if call < self._last_skip else 0
        return sorted(stored, reverse=True)[kept:]

    @property
    def kept(self) -> int:
        """With a gate, how many of the newest residuals are kept."""
        assert self.gate is not None
        return max(self.history, self.gate.order + 1)

    @cached_property
    def _last_skip(self) -> int:
        return max((call for call, runs in enumerate(self.full) if not runs), default=-1)

    def phase_of(self, call: int | None) -> int:
        """The phase that a call belongs to; phase 0, the careful one, where the call is unknown."""
        return 0 if call is None else self._phase_by_call[call]

    def matches(self, call: int, timestep: float) -> bool:
        """Whether a timestep is the one that the plan expects at a call."""
        assert self.timesteps is not None
        return abs(timestep - self.timesteps[call]) <= self._tolerance[call]

    def find(self, timestep: float, *, near: int = 0) -> int | None:
        """The call with this timestep: the first one from `near` on, else the first of all."""
        order = (*range(near, self.calls), *range(min(near, self.calls)))
        return next((call for call in order if self.matches(call, timestep)), None)

    @cached_property
    def _phase_by_call(self) -> tuple[int, ...]:
        ends = [end for _, end in self.phases]
        return tuple(bisect_right(ends, call) for call in range(self.calls))

    @cached_property
    def _tolerance(self) -> tuple[float, ...]:
        # Below half the gap to the next distinct timestep, so that no value matches two of them.
        assert self.timesteps is not None
        values = sorted(set(self.timesteps))
        gap = dict.fromkeys(values, math.inf)
        for low, high in pairwise(values):
            gap[low] = min(gap[low], high - low)
            gap[high] = min(gap[high], high - low)
        return tuple(min(abs(v) * _TIMESTEP_TOLERANCE, 0.45 * gap[v]) for v in self.timesteps)

    def _check_lengths(self) -> None:
        if not self.full:
            raise PlanError("the schedule has no calls, expected at least one")
        for name, value in (("coefficients", self.coefficients), ("timesteps", self.timesteps)):
            if value is not None and len(value) != self.calls:
                raise PlanError(f"{name} has {len(value)} entries, expected {self.calls} (calls)")
        if self.timesteps is not None and not all(map(math.isfinite, self.timesteps)):
            raise PlanError("timesteps holds a value that is not finite")
        if self.branches < 1:
            raise PlanError(f"branches is {self.branches}, expected at least 1")

    def _check_phases(self) -> None:
        end = 0
        for first, stop in self.phases:
            if first != end or stop <= first:
                raise PlanError(
                    f"phase [{first}, {stop}] does not continue from call {end}",
                    remedy="Phases are half-open, not empty and contiguous from 0.",
                )
            end = stop
        if end != self.calls:
            raise PlanError(f"phases end at call {end}, expected {self.calls} (calls)")

    def _check_rows(self) -> None:
        if not self.full[0]:
            raise PlanError("call 0 is a skip call, expected a full one: nothing is stored yet")
        stored = 0
        for call, (runs, row) in enumerate(zip(self.full, self.coefficients, strict=True)):
            if runs:
                stored += 1
                continue
            if not row:
                raise PlanError(f"skip call {call} has no forecast coefficients")
            if any(c != 0.0 for c in row[stored:]):
                raise PlanError(
                    f"skip call {call} uses {len(row)} stored residuals, only {stored} exist"
                )
            total, gain = math.fsum(row), math.fsum(map(abs, row))
            if not abs(total - 1.0) <= 1e-6:  # written so that NaN fails
                raise PlanError(f"coefficients of call {call} sum to {total:.8g}, expected 1")
            if gain > MAX_GAIN:
                raise PlanError(
                    f"coefficients of call {call} have sum |c| = {gain:.4g}, at most {MAX_GAIN:g}",
                    remedy="Such a forecast amplifies noise; plan again.",
                )
