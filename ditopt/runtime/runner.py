"""`StepRuntime`: the callable that a backend returns; it owns the steps of the denoising loop.

Dynamo sees one opaque function, so the branch between full and skipped steps costs no graph break
and no recompilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ditopt.errors import PlanError
from ditopt.runtime.counters import Artifact, activate
from ditopt.runtime.doubts import Doubt
from ditopt.runtime.forecast import forecast
from ditopt.runtime.inputs import InputRoles
from ditopt.runtime.static_inputs import Hold

if TYPE_CHECKING:
    from ditopt.runtime.cuda_graphs import CudaGraphs
    from ditopt.runtime.schedule import StepSchedule
    from ditopt.runtime.tracker import Step, TrajectoryTracker

Tensors = Sequence[Tensor]

# Numbers for runtimes: unlike `id`, they are not given again to a later one.
_scopes = count()


class Forecast(Protocol):
    """`forecast.forecast` or a compiled form of it."""

    def __call__(
        self, base: Tensor | None, residuals: Sequence[Tensor], coefficients: Tensor
    ) -> Tensor:
        """`base + sum_j coefficients[j] * residuals[j]`."""


def _as_they_are(inputs: Sequence[Any], phase: int | None) -> Sequence[Any]:
    return inputs


@dataclass(frozen=True)
class Programs:
    """A lowered model: three programs around its block stack.

    Attributes:
        head: bound -> (carry, rest): what enters the block stack, and anything the others need.
        body: (bound, carry, rest, phase) -> outputs: the block stack, with the choices of a phase.
            It must not write into `carry`.
        tail: (bound, outputs, rest) -> the model's result. It may write into `outputs`.
        base: for each output of the body the index of the carried tensor, of the same shape and
            dtype, that the body adds to; None where there is none.
        roles: what the inputs mean to a sampling run.
        bind: (inputs, phase) -> bound: everything that the three read, the inputs first, then
            what the host keeps from call to call (derived weights, block lists) for a call of that
            phase, or for a skip call where the phase is None. All that depends on the host's state
            happens here: the others do the same work for the same shapes.
    """

    head: Callable[[Sequence[Any]], tuple[Tensors, Any]]
    body: Callable[[Sequence[Any], Tensors, Any, int], Tensors]
    tail: Callable[[Sequence[Any], Tensors, Any], Any]
    base: tuple[int | None, ...]
    roles: InputRoles = field(default_factory=InputRoles)
    bind: Callable[[Sequence[Any], int | None], Sequence[Any]] = _as_they_are


class StepRuntime:
    """Runs a model's programs, in full or with a forecast in the place of the block stack.

    Args:
        programs: the lowered model.
        schedule: the plan's calls; None runs everything in full.
        tracker: recognises sampling runs; shared by all runtimes of one model and plan. Required
            when the schedule has skip calls or several phases.
        forecast: replaces the eager forecast, for instance by its compiled form.
        graphs: records each kind of step as a CUDA graph; None launches kernel by kernel.
    """

    def __init__(
        self,
        programs: Programs,
        schedule: StepSchedule | None = None,
        tracker: TrajectoryTracker | None = None,
        *,
        forecast: Forecast = forecast,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.programs = programs
        self.artifact = Artifact()
        self.tracker = None
        self._forecast = forecast
        self._graphs = graphs
        self._weights = frozenset(programs.roles.weights)
        if graphs is not None:
            self.artifact.on_invalidate(graphs.forget_copies)
        if schedule is None or schedule.trivial:
            return
        if tracker is None or tracker.schedule != schedule:
            raise PlanError(
                "the schedule needs a tracker of its own calls",
                remedy="Make one TrajectoryTracker(schedule) for all runtimes of the model.",
            )
        self.tracker = tracker
        self.artifact.on_invalidate(tracker.clear)
        self._schedule = schedule
        self._probed = programs.roles.probed
        self._scope = next(_scopes)
        self._rows: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """One call of the model, with the arguments of the captured graph in order."""
        outer = activate(self.artifact.counters)
        try:
            if self.tracker is None:
                return self._run_plain(inputs)
            return self._run_step(self.tracker, inputs)
        finally:
            activate(outer)

    def _run_plain(self, inputs: Sequence[Any]) -> Any:
        bound = self.programs.bind(inputs, 0)
        function = partial(self._full, phase=0, store=False)
        result, _, _ = self._launch("full", function, bound, len(inputs), variant=(0, False))
        self.artifact.counters.ran(skipped=False)
        return result

    def _run_step(self, tracker: TrajectoryTracker, inputs: Sequence[Any]) -> Any:
        step = tracker.locate(inputs, self.programs.roles, self._probed, self._scope)
        stored: tuple[Tensor, ...] | None = None
        try:
            history, doubt = self._history(step)
            if history and step.call is not None:
                result = self._run_skip(inputs, step.call, history)
            else:
                result, stored = self._run_full(inputs, step)
        except BaseException:
            tracker.abandon(step)
            raise
        self._keep(step, stored)
        tracker.advance(step)
        self.artifact.counters.ran(skipped=bool(history), doubt=doubt)
        return result

    def _history(self, step: Step) -> tuple[list[tuple[Tensor, ...]], Doubt | None]:
        """What a skip call combines, newest first; empty for a full call, with the doubt if any."""
        if step.call is None or step.branch is None:
            return [], step.doubt
        sources = self._schedule.sources[step.call]
        if not sources:
            return [], None
        if step.doubt is not None:
            return [], step.doubt
        stored = step.branch.residuals
        history = [stored[source] for source, _ in sources if source in stored]
        return (history, None) if len(history) == len(sources) else ([], step.branch.gap)

    def _run_full(self, inputs: Sequence[Any], step: Step) -> tuple[Any, tuple[Tensor, ...] | None]:
        """The result, and the residuals where the schedule wants them stored."""
        branch = step.branch
        store = branch is not None and step.doubt is None and step.call in self._schedule.last_use
        bound = self.programs.bind(inputs, step.phase)
        function = partial(self._full, phase=step.phase, store=store)
        variant = step.phase, store
        result, stored, mutated = self._launch(
            "full", function, bound, len(inputs), variant=variant
        )
        if mutated and branch is not None:
            branch.drop_residuals(Doubt.CARRY_MUTATED)
        return result, stored

    def _full(
        self, bound: Sequence[Any], *, phase: int, store: bool
    ) -> tuple[Any, tuple[Tensor, ...] | None, bool]:
        """Result, residuals, and whether they are missing because the base was overwritten."""
        programs = self.programs
        carry, rest = programs.head(bound)
        before = _versions(carry) if store else []
        outputs = programs.body(bound, carry, rest, phase)
        mutated = store and _versions(carry) != before
        stored = None
        if store and not mutated:
            # New storage for each: the tail and later calls may write into the outputs.
            stored = tuple(
                (output.clone() if base is None else output - carry[base]).detach()
                for output, base in zip(outputs, programs.base, strict=True)
            )
        return programs.tail(bound, outputs, rest), stored, mutated

    def _run_skip(
        self, inputs: Sequence[Any], call: int, history: Sequence[tuple[Tensor, ...]]
    ) -> Any:
        bound = self.programs.bind(inputs, None)
        rows = [self._rows_like(residual)[call] for residual in history[0]]
        function = partial(self._skip, given=len(bound), stored=len(history))
        own = [*chain.from_iterable(history), *rows]
        variant = len(bound), len(history)
        return self._launch("skipped", function, bound, len(inputs), own, variant=variant)

    def _skip(self, flat: Sequence[Any], *, given: int, stored: int) -> Any:
        """The result, with forecasts in the place of the block stack.

        Args:
            flat: what is bound, then the outputs' residuals, newest first, then a row for each.
            given: length of what is bound.
            stored: number of calls whose residuals follow.
        """
        bound, programs = flat[:given], self.programs
        carry, rest = programs.head(bound)
        many = len(programs.base)
        rows = flat[given + stored * many :]
        outputs = []
        for position, base in enumerate(programs.base):
            residuals = flat[given + position : given + stored * many : many]
            add_to = None if base is None else carry[base]
            outputs.append(self._forecast(add_to, residuals, rows[position]))
        return programs.tail(bound, outputs, rest)

    def _launch(
        self,
        kind: str,
        function: Callable[[Sequence[Any]], Any],
        bound: Sequence[Any],
        inputs: int,
        own: Sequence[Tensor] = (),
        *,
        variant: tuple[Any, ...],
    ) -> Any:
        """`function([*bound, *own])`; the first `inputs` of `bound` are the call's arguments."""
        arguments = [*bound, *own] if own else bound
        if self._graphs is None:
            return function(arguments)
        holds = _holds(self._weights, inputs, len(bound), len(arguments))
        return self._graphs.run(kind, function, arguments, holds, variant=variant)

    def _rows_like(self, residual: Tensor) -> list[Tensor]:
        """[T] the rows of non-zero coefficients, on a residual's device, copied there once."""
        key = (residual.device, torch.promote_types(residual.dtype, torch.float32))
        rows = self._rows.get(key)
        if rows is None:
            weights = [[c for _, c in row] for row in self._schedule.sources]
            flat = torch.tensor([c for row in weights for c in row], dtype=key[1]).to(key[0])
            rows = self._rows[key] = list(flat.split_with_sizes([len(row) for row in weights]))
        return rows

    def _keep(self, step: Step, stored: tuple[Tensor, ...] | None) -> None:
        """Store a full call's residual and let go of those that no later call reads."""
        if step.branch is None or step.call is None:
            return
        residuals, last_use = step.branch.residuals, self._schedule.last_use
        if stored is not None:
            residuals[step.call] = stored
        for source in [source for source in residuals if last_use[source] <= step.call]:
            del residuals[source]


def _versions(tensors: Tensors) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@lru_cache(maxsize=64)
def _holds(weights: frozenset[int], inputs: int, bound: int, total: int) -> tuple[Hold, ...]:
    """How a CUDA graph reads the call's arguments, what is bound to them, and our own tensors."""
    given = (Hold.IN_PLACE if at in weights else Hold.COPIED for at in range(inputs))
    return (*given, *(Hold.KEPT,) * (bound - inputs), *(Hold.OWN,) * (total - bound))
