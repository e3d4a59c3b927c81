"""`StepRuntime`: the callable that a backend returns; it owns the steps of the denoising loop.

Dynamo sees one opaque function, so the branch between full and skipped steps costs no graph break
and no recompilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from ditopt.errors import PlanError
from ditopt.kernels.block_selection.reuse import keeping
from ditopt.runtime.counters import Artifact, activate
from ditopt.runtime.doubts import Doubt
from ditopt.runtime.forecast import forecast
from ditopt.runtime.gate import read
from ditopt.runtime.history import Rows, sources_of
from ditopt.runtime.programs import (
    Forecast,
    Full,
    Programs,
    Started,
    Tensors,
    measure,
    run_full,
    run_skip,
    start,
)
from ditopt.runtime.static_inputs import Hold

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.runtime.cuda_graphs import CudaGraphs
    from ditopt.runtime.history import Sources
    from ditopt.runtime.schedule import StepSchedule
    from ditopt.runtime.tracker import Step, TrajectoryTracker

# Numbers for runtimes: unlike `id`, they are not given again to a later one.
_scopes = count()


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
        self._scope = next(_scopes)
        self._rows = Rows(schedule)

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
        full: Full = self._launch("full", partial(run_full, self.programs), bound, len(inputs))
        self.artifact.counters.ran(skipped=False)
        return full.result

    def _run_step(self, tracker: TrajectoryTracker, inputs: Sequence[Any]) -> Any:
        step = tracker.locate(inputs, self.programs.roles, self._scope)
        stored: tuple[Tensor, ...] | None = None
        gated: bool | None = None
        # A CUDA graph does the same work each time, whatever the host has kept.
        usable = step.branch is not None and step.doubt is None and self._graphs is None
        kept = step.branch.kept if step.branch is not None and usable else None
        try:
            sources, doubt = self._sources(step)
            with keeping(kept):
                if not sources:
                    result, stored = self._run_full(inputs, step)
                elif self._schedule.gate is None:
                    result = self._run_skip(inputs, step, sources)
                else:
                    result, stored, gated = self._run_gated(inputs, step, sources)
        except BaseException:
            tracker.abandon(step)
            raise
        self._keep(step, stored)
        tracker.advance(step)
        skipped = bool(sources) and not gated
        self.artifact.counters.ran(skipped=skipped, doubt=doubt, gated=gated)
        return result

    def _sources(self, step: Step) -> tuple[Sources, Doubt | None]:
        """What a skip call combines; empty for a full call, with the doubt if any."""
        if step.call is None or step.branch is None:
            return (), step.doubt
        if not self._schedule.sources[step.call]:
            return (), None
        if step.doubt is not None:
            return (), step.doubt
        sources = sources_of(self._schedule, step.call, step.branch.residuals)
        return ((), step.branch.gap) if sources is None else (sources, None)

    def _run_full(self, inputs: Sequence[Any], step: Step) -> tuple[Any, tuple[Tensor, ...] | None]:
        """The result, and what is to be stored."""
        bound = self.programs.bind(inputs, step.phase)
        return self._finish_full(bound, len(inputs), step, None)

    def _finish_full(
        self, bound: Sequence[Any], inputs: int, step: Step, started: Started | None
    ) -> tuple[Any, tuple[Tensor, ...] | None]:
        branch = step.branch
        store = branch is not None and step.doubt is None and self._schedule.stores(step.call)
        function = partial(
            run_full,
            self.programs,
            phase=step.phase,
            store=store,
            gate=self._schedule.gate,
            started=started,
        )
        full: Full = self._launch("full", function, bound, inputs, variant=(step.phase, store))
        if full.mutated and branch is not None:
            branch.drop_residuals(Doubt.CARRY_MUTATED)
        return full.result, full.stored

    def _run_skip(self, inputs: Sequence[Any], step: Step, sources: Sources) -> Any:
        bound = self.programs.bind(inputs, None)
        history, rows = self._history(step, sources)
        return self._finish_skip(bound, len(inputs), history, rows, None)

    def _finish_skip(
        self,
        bound: Sequence[Any],
        inputs: int,
        history: Sequence[Tensors],
        rows: Tensors,
        started: Started | None,
    ) -> Any:
        def skip(bound: Sequence[Any], history: Sequence[Tensors], rows: Tensors) -> Any:
            return run_skip(self.programs, bound, history, rows, self._forecast, started=started)

        # Only the residuals: a forecast does not read the gate's signals.
        history = [stored[: len(rows)] for stored in history]
        return self._launch_own("skipped", skip, bound, inputs, history, rows)

    def _run_gated(
        self, inputs: Sequence[Any], step: Step, sources: Sources
    ) -> tuple[Any, tuple[Tensor, ...] | None, bool]:
        """The result, what is to be stored, and whether the gate made the call full."""
        gate = self._schedule.gate
        assert gate is not None
        bound = self.programs.bind(inputs, step.phase)
        history, rows = self._history(step, sources)
        # A graph begins again from the inputs: its own intermediate values stay inside.
        started = None if self._graphs else start(self.programs, bound, step.phase, gate)

        def look(bound: Sequence[Any], history: Sequence[Tensors], rows: Tensors) -> Tensor:
            begun = started or start(self.programs, bound, step.phase, gate)
            return measure(self.programs, begun, gate, history, rows)

        value = self._launch_own("gate", look, bound, len(inputs), history, rows, step.phase)
        if gate.opens(read(value, gate.group)):
            return self._finish_skip(bound, len(inputs), history, rows, started), None, False
        return *self._finish_full(bound, len(inputs), step, started), True

    def _launch(
        self,
        kind: str,
        function: Callable[[Sequence[Any]], Any],
        bound: Sequence[Any],
        inputs: int,
        own: Sequence[Tensor] = (),
        *,
        variant: tuple[Any, ...] = (),
    ) -> Any:
        """`function([*bound, *own])`; the first `inputs` of `bound` are the call's arguments."""
        arguments = [*bound, *own] if own else bound
        if self._graphs is None:
            return function(arguments)
        holds = _holds(self._weights, inputs, len(bound), len(arguments))
        return self._graphs.run(kind, function, arguments, holds, variant=variant)

    def _launch_own(
        self,
        kind: str,
        function: Callable[[Sequence[Any], Sequence[Tensors], Tensors], Any],
        bound: Sequence[Any],
        inputs: int,
        history: Sequence[Tensors],
        rows: Tensors,
        phase: int | None = None,
    ) -> Any:
        """`function(bound, history, rows)`."""
        given, width, calls = len(bound), len(history[0]), len(history)

        def flat(arguments: Sequence[Any]) -> Any:
            own = arguments[given:]
            stored = [own[k * width : (k + 1) * width] for k in range(calls)]
            return function(arguments[:given], stored, own[calls * width :])

        own = [*chain.from_iterable(history), *rows]
        return self._launch(kind, flat, bound, inputs, own, variant=(given, width, calls, phase))

    def _history(self, step: Step, sources: Sources) -> tuple[list[Tensors], list[Tensor]]:
        """What was stored at each source, and a row of coefficients for each output."""
        assert step.branch is not None
        history: list[Tensors] = [step.branch.residuals[source] for source, _ in sources]
        many = len(self.programs.base)
        coefficients = tuple(coefficient for _, coefficient in sources)
        return history, [self._rows.like(residual, coefficients) for residual in history[0][:many]]

    def _keep(self, step: Step, stored: tuple[Tensor, ...] | None) -> None:
        """Store a full call's residual and let go of those that no later call reads."""
        if step.branch is None or step.call is None:
            return
        residuals = step.branch.residuals
        if stored is not None:
            residuals[step.call] = stored
        for source in self._schedule.outdated(residuals, step.call):
            del residuals[source]


@lru_cache(maxsize=64)
def _holds(weights: frozenset[int], inputs: int, bound: int, total: int) -> tuple[Hold, ...]:
    """How a CUDA graph reads the call's arguments, what is bound to them, and our own tensors."""
    given = (Hold.IN_PLACE if at in weights else Hold.COPIED for at in range(inputs))
    return (*given, *(Hold.KEPT,) * (bound - inputs), *(Hold.OWN,) * (total - bound))
