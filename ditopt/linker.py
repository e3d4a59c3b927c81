"""Connect one captured graph to the plan, the backend and the step runtime."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ditopt import fingerprint
from ditopt.attention_choices import AttentionChoices, grid_of
from ditopt.errors import CaptureError, DitoptWarning, StrictModeError
from ditopt.gating import runtime_gate
from ditopt.hoist import varying_inputs
from ditopt.infer_layout import infer_grid
from ditopt.linear_choices import linear_choices, statistics_of
from ditopt.part_maker import Phase
from ditopt.program import ProgramBuilder
from ditopt.report import Decision
from ditopt.runtime import CudaGraphs, InputRoles, StepRuntime, StepSchedule, TrajectoryTracker
from ditopt.stack import Stack, find_stack, unseen_inputs

if TYPE_CHECKING:
    from ditopt.backends.base import Backend
    from ditopt.capture import Captured
    from ditopt.config import Options
    from ditopt.plan import Plan
    from ditopt.plan.checks import SiteLike
    from ditopt.plan.schema import Phase as PlanPhase
    from ditopt.quantization import LinearRule
    from ditopt.runtime import Gate
    from ditopt.torch_backend import Compiled

_trackers: weakref.WeakKeyDictionary[nn.Module, dict[int, TrajectoryTracker]] = (
    weakref.WeakKeyDictionary()
)


class Linker:
    """Makes the callable that Dynamo gets for one captured graph.

    Args:
        captured: the graph.
        inputs: the values of its first call, in Dynamo's order.
        record: what is known about the graph; decisions are added to it.
        options: of the `torch.compile` call.
        root: the model, or None where it was not found.
    """

    def __init__(
        self,
        captured: Captured,
        inputs: Sequence[Any],
        record: Compiled,
        options: Options,
        root: nn.Module | None,
    ) -> None:
        self.captured = captured
        self.inputs = inputs
        self.record = record
        self.options = options
        self.root = root
        self.plan: Plan | None = options.load_plan()
        self.builder: ProgramBuilder | None = None

    def link(self, backend: Backend) -> StepRuntime:
        """Lower the graph as the plan says.

        Raises:
            PlanError: the plan belongs to another model.
        """
        inferred = infer_grid(self.captured, self.inputs)
        self.record.grid = inferred[0] if inferred is not None else None
        phases, schedule, stack = [Phase()], None, None
        if self.plan is not None:
            self._check(self.plan)
            attention = AttentionChoices(self.plan, self.captured, self.record, self.options)
            phases = [
                Phase(attention.of(p), self._linear_choices(self.plan, p)) for p in self.plan.phases
            ]
            stack = self._cached_stack(self.plan)
            schedule = plan_schedule(
                self.plan,
                self._gate(self.plan, stack),
                cached=stack is not None,
                keeps_lists=attention.keep_lists(),
            )
            if stack is None and len(phases) > 1:
                stack = _whole(self.captured)
        builder = ProgramBuilder(
            self.captured,
            self.record.attention,
            backend,
            self.options,
            self._device(),
            self.record.linear,
            statistics_of(self.plan.tensors) if self.plan is not None else None,
        )
        self.builder = builder
        roles = self._roles()
        order = self.plan.order if self.plan is not None else None
        grid = grid_of(self.plan, self.record) if self.plan is not None else None
        probe = _probed(self.plan) if schedule is not None and schedule.gate is not None else 0
        programs = builder.build(phases, stack, roles, self._varying(roles), order, grid, probe)
        self.record.decisions += builder.decisions
        self.record.programs = len(builder.programs)
        tracker = self._tracker(schedule) if schedule is not None and not schedule.trivial else None
        runtime = StepRuntime(programs, schedule, tracker, graphs=self._graphs())
        runtime.artifact.own(value for value in self.inputs if isinstance(value, nn.Parameter))
        if self.root is not None:
            runtime.artifact.root = weakref.ref(self.root)
        for derived in builder.derived.tensors:
            runtime.artifact.on_invalidate(derived.invalidate)
        self.record.derived = builder.derived
        for memo in builder.memos.values():
            runtime.artifact.on_invalidate(memo.clear)
        return runtime

    def _varying(self, roles: InputRoles) -> Sequence[int] | None:
        """Slots of the inputs that are new in each call; None where nothing is to be hoisted."""
        if roles.varying:
            return roles.varying
        own = sum(item.role == "parameter" for item in self.captured.inputs)
        if self.root is None or 2 * own < sum(1 for _ in self.root.parameters()):
            if self.options.hoist:
                reason = "the graph is a part of the model, so its inputs are new in each call"
                self._decide("hoist", False, reason)
            return None
        users = [self.inputs[slot] for slot in self.captured.user_inputs.values()]
        if any(isinstance(value, torch.Tensor) and value.is_inference() for value in users):
            reason = "inference tensors carry no counter of changes: kept inside a session only"
            self._decide("hoist", False, reason)
        return varying_inputs(self.captured)

    def _graphs(self) -> CudaGraphs | None:
        if not self.options.cuda_graphs:
            return None
        if self._device().type != "cuda":
            self._decide("cuda_graphs", False, f"the model is on {self._device()}")
            return None
        record, strict = self.record, self.options.strict

        def decide(applied: bool, reason: str) -> None:
            record.decisions.append(Decision("model", "cuda_graphs", applied, reason))
            if strict and not applied:
                raise StrictModeError(reason, remedy="Leave cuda_graphs or strict out.")

        return CudaGraphs(decide)

    def _decide(self, rule: str, applied: bool, reason: str) -> None:
        self.record.decisions.append(Decision("model", rule, applied, reason))

    def _device(self) -> torch.device:
        tensors = [value for value in self.inputs if isinstance(value, torch.Tensor)]
        parameters = [value for value in tensors if isinstance(value, nn.Parameter)]
        return (parameters or tensors)[0].device if tensors else torch.device("cpu")

    def _roles(self) -> InputRoles:
        names = [
            None if item.role in ("parameter", "buffer") else item.name
            for item in self.captured.inputs
            if item.role != "constant"
        ]
        if self.plan is None:
            return InputRoles.from_names(names, timestep=None, varying=())
        sampler = self.plan.sampler
        return InputRoles.from_names(names, timestep=sampler.timestep, varying=sampler.varying)

    def _check(self, plan: Plan) -> None:
        """Compare the plan's fingerprints and sites with the model's."""
        if self.root is None:
            reason = "the model was not found, so the plan's fingerprint is not checked"
            self._decide("plan", False, reason)
            return
        found = {site.id for site in self.record.attention}
        sites: tuple[SiteLike, ...]
        if {site.id for site in plan.model.sites} <= found:
            sites = tuple(site for site in self.record.attention if site.form == "softmax")
        else:  # one of several graphs: the sites cannot be compared one by one
            sites = plan.model.sites
        notes = plan.validate_against(
            sites, fingerprint.architecture(self.root), fingerprint.weights(self.root)
        )
        for note in notes:
            warnings.warn(note, DitoptWarning, stacklevel=2)
            self._decide("plan", True, note)

    def _linear_choices(self, plan: Plan, phase: PlanPhase) -> dict[str, LinearRule | str]:
        """For each linear layer that the plan names, its format, or why it cannot be used here."""
        if not phase.linear:
            return {}
        here = (self.captured, self.record.linear, self.inputs)
        found = linear_choices(*here, phase.linear, statistics_of(plan.tensors))
        for site in phase.linear.keys() - found.keys():
            reason = "the graph has no linear layer of this name"
            self.record.decisions.append(Decision(site, "quantize_linears", False, reason))
        return found

    def _cached_stack(self, plan: Plan) -> Stack | None:
        """The block stack that the plan's skip calls leave out; None where nothing is cached."""
        if plan.cache is None:
            return None
        found = self._stack_or_reason(plan)
        if isinstance(found, str):
            self._decide("cache_blocks", False, found)
            return None
        first, last = self.captured.pieces[found.first], self.captured.pieces[found.end - 1]
        calls = plan.sampler.calls
        self._decide(
            "cache_blocks",
            True,
            f"{calls - len(plan.cache.full)} of {calls} calls forecast "
            f"the output of {first.path} to {last.path}",
        )
        steady = {plan.sampler.timestep}
        unseen = unseen_inputs(self.captured, found, set(plan.sampler.varying) - steady)
        if unseen:
            more = f" and {len(unseen) - 2} more" if len(unseen) > 2 else ""
            self._decide(
                "cache_inputs",
                True,
                f"{', '.join(unseen[:2])}{more} change from call to call and enter inside these "
                "blocks: a skipped call forecasts their effect from earlier calls",
            )
        return found

    def _gate(self, plan: Plan, stack: Stack | None) -> Gate | None:
        if plan.cache is None or stack is None:
            return None
        gate = runtime_gate(plan.cache, self.captured, stack, self.options.gate_group)
        if gate is not None:
            together = f", by the largest of group {gate.group}" if gate.group else ""
            reason = (
                f"each of the {len(plan.cache.coefficients)} calls that may skip waits once for "
                f"the device: a change of kind {gate.kind} over {gate.threshold:g} makes it "
                f"full{together}"
            )
            self._decide("gate", True, reason)
        return gate

    def _stack_or_reason(self, plan: Plan) -> Stack | str:
        here = {site.id for site in self.record.attention}
        missing = {site.id for site in plan.model.sites} - here
        if missing:
            return f"the model was captured in several graphs (this one lacks {min(missing)})"
        return find_stack(self.captured)

    def _tracker(self, schedule: StepSchedule) -> TrajectoryTracker:
        """One tracker for all graphs of a model under one plan.

        A recompilation in mid-run (another resolution or batch size) then keeps the position.
        """
        if self.root is None:
            return TrajectoryTracker(schedule)
        by_plan = _trackers.setdefault(self.root, {})
        key = hash(self.plan)
        if key not in by_plan or by_plan[key].schedule != schedule:
            by_plan[key] = TrajectoryTracker(schedule, model=type(self.root).__name__)
        return by_plan[key]


def plan_schedule(
    plan: Plan, gate: Gate | None, *, cached: bool, keeps_lists: bool = False
) -> StepSchedule:
    """The plan's calls; all of them in full where the cache cannot be used."""
    calls = plan.sampler.calls
    cache = plan.cache if cached else None
    return StepSchedule.build(
        calls,
        cache.full if cache is not None else range(calls),
        cache.coefficients if cache is not None else {},
        timesteps=plan.sampler.timesteps or None,
        phases=[phase.calls for phase in plan.phases],
        branches=plan.sampler.branches,
        gate=gate,
        keeps_lists=keeps_lists,
    )


def _probed(plan: Plan | None) -> int:
    """How many blocks run before a gate decides."""
    gate = plan.cache.gate if plan is not None and plan.cache is not None else None
    return 0 if gate is None or gate.kind == "input" else gate.blocks or 1


def _whole(captured: Captured) -> Stack:
    """Every piece, as the part that differs between phases where nothing is cached."""
    if not captured.pieces:
        raise CaptureError("the graph is empty, so a plan has nothing to choose")
    outputs = tuple(slot for slot in dict.fromkeys(captured.outputs) if isinstance(slot, int))
    return Stack(0, len(captured.pieces), outputs, ())
