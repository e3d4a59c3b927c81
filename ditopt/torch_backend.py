"""The `torch.compile` backends `ditopt` and `ditopt_eager`.

`torch.compile(model, backend="ditopt", options={"plan": "plan.yaml"})`: capture, passes, lowering, and a callable that owns the steps.
`ditopt_eager` is the same up to lowering and then runs by PyTorch and reference kernels.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ditopt.config import Options
from ditopt.errors import CaptureError, DitoptWarning, PlanError, StrictModeError
from ditopt.report import Decision

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.plan import Plan
    from ditopt.runtime import TrajectoryTracker
    from ditopt.sites import AttentionSite, LinearSite


@dataclass
class Compiled:
    """What is known about one compiled graph of a model.

    Attributes:
        root: the model, weakly; None where it could not be found.
        attention, linear: its sites.
        decisions: everything that was decided, in order.
        pieces: kinds and names of its pieces in order.
        programs: number of distinct lowered programs.
        grid: frames, rows, columns of the token grid, or None.
        seconds: time spent in the backend, by part.
    """

    root: Callable[[], nn.Module | None]
    attention: list[AttentionSite] = field(default_factory=list)
    linear: list[LinearSite] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)
    programs: int = 0
    grid: tuple[Any, Any, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


_compiled: list[Compiled] = []
_trackers: weakref.WeakKeyDictionary[nn.Module, dict[int, TrajectoryTracker]] = (
    weakref.WeakKeyDictionary()
)


def compiled_graphs(model: nn.Module) -> list[Compiled]:
    """What was compiled from a model, oldest first."""
    model = getattr(model, "_orig_mod", model)
    return [record for record in _compiled if record.root() is model]


def ditopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of `torch.compile`: capture, rewrite by the plan, lower to Inductor."""
    return compile_graph(gm, example_inputs, _parse(options, mode), "inductor")


def ditopt_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The same without a compiler: PyTorch and the reference kernels run the rewritten graph."""
    return compile_graph(gm, example_inputs, _parse(options, mode), "eager")


def _parse(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    parsed = Options.parse(options)
    if mode is None or mode == "default":
        return parsed
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        from ditopt.errors import ConfigError, did_you_mean

        raise ConfigError(f"unknown mode {mode!r}", remedy=did_you_mean(mode, known))
    return parsed.model_copy(update={"inductor": {**known[mode], **parsed.inductor}})


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, backend_name: str
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Raises:
        PlanError: the plan belongs to another model.
        StrictModeError: strict mode, and something had to be given up.
    """
    from ditopt.capture import capture
    from ditopt.pipeline import BACKENDS
    from ditopt.root import find_root
    from ditopt.sites import find_sites

    started = time.perf_counter()
    backend = BACKENDS[backend_name]
    tensors = [t for t in example_inputs if isinstance(t, nn.Parameter)]
    root = find_root(tensors)
    record = Compiled(root=weakref.ref(root) if root is not None else lambda: None)
    _compiled.append(record)

    declined = _decline(root, tensors)
    if declined is not None:
        return _fall_back(gm, example_inputs, record, declined, options, backend_name)

    captured = capture(gm, prefix=_prefix(gm, example_inputs, root))
    record.decisions += captured.decisions
    record.pieces = [(piece.kind, piece.path) for piece in captured.pieces]
    record.attention, record.linear = find_sites(captured)
    record.seconds["capture"] = time.perf_counter() - started
    runtime = _Linker(gm, captured, example_inputs, record, options, root).link(backend)
    record.seconds["total"] = time.perf_counter() - started
    if options.strict:
        _refuse_losses(record)
    return runtime


def _prefix(gm: fx.GraphModule, example_inputs: Sequence[Any], root: nn.Module | None) -> str:
    from ditopt.capture import describe_inputs
    from ditopt.root import frame_prefix

    if root is None:
        return ""
    described = zip(describe_inputs(gm), example_inputs, strict=True)
    return frame_prefix(
        root, [(i.name, value) for i, value in described if i.role in ("parameter", "buffer")]
    )


def _decline(root: nn.Module | None, tensors: Sequence[torch.Tensor]) -> str | None:
    """Why ditopt leaves a graph alone, by name, or None."""
    from ditopt.root import compiled_in_parts, offload_hook

    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "training: gradients are enabled and parameters require them; ditopt optimizes inference only"
    if root is None:
        return None
    hook = offload_hook(root)
    if hook is not None:
        return f"CPU offload: {hook} moves the weights during the forward, so nothing may hold on to them"
    if compiled_in_parts(root, tensors):
        return "compile_repeated_blocks: all blocks share one compiled frame, so choices per layer are impossible"
    return None


def _fall_back(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    record: Compiled,
    reason: str,
    options: Options,
    backend_name: str,
) -> Callable[..., Any]:
    """Plain Inductor (or plain eager) for a graph that ditopt declines."""
    record.decisions.append(Decision("model", "capture", False, reason))
    if options.strict:
        raise StrictModeError(
            reason, remedy="Use torch.no_grad() and compile the whole model, or switch strict off."
        )
    if options.plan is not None:
        raise PlanError(
            f"the plan cannot be applied: {reason}",
            remedy="Compile the whole model under torch.no_grad().",
        )
    warnings.warn(
        f"ditopt leaves this graph to {backend_name}: {reason}", DitoptWarning, stacklevel=2
    )
    if backend_name == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(
        gm, list(example_inputs), config_patches=dict(options.inductor) or None
    )
    return compiled


def _refuse_losses(record: Compiled) -> None:
    lost = [d for d in record.decisions if not d.applied and d.rule not in ("fuse_projections",)]
    if lost:
        raise StrictModeError(
            "strict mode: " + "; ".join(f"{d.site} ({d.rule}): {d.reason}" for d in lost[:3]),
            remedy="`ditopt explain` lists every decision.",
        )


class _Linker:
    """Connects one captured graph to the plan, the backend and the step runtime."""

    def __init__(
        self,
        gm: fx.GraphModule,
        captured: Captured,
        example_inputs: Sequence[Any],
        record: Compiled,
        options: Options,
        root: nn.Module | None,
    ) -> None:
        self.captured = captured
        self.inputs = example_inputs
        self.record = record
        self.options = options
        self.root = root
        self.plan: Plan | None = options.load_plan()

    def link(self, backend: Any) -> Callable[..., Any]:
        """The callable for Dynamo."""
        from ditopt.infer_layout import infer_grid
        from ditopt.program import Phase, ProgramBuilder
        from ditopt.runtime import StepRuntime

        inferred = infer_grid(self.captured, self.inputs)
        self.record.grid = inferred[0] if inferred is not None else None
        schedule, stack = None, None
        phases = [Phase()]
        if self.plan is not None:
            self._check_plan(self.plan)
            phases = [
                Phase(self._choices(self.plan, phase.attention)) for phase in self.plan.phases
            ]
            schedule, stack = self._schedule(self.plan)
        builder = ProgramBuilder(
            self.captured, self.record.attention, backend, self.options, self._device()
        )
        programs = builder.build(phases, stack, self._roles())
        self.record.decisions += builder.decisions
        self.record.programs = len(builder.programs)
        tracker = self._tracker(schedule) if schedule is not None and not schedule.trivial else None
        runtime = StepRuntime(programs, schedule, tracker)
        runtime.artifact.own(
            t for t in self.inputs if isinstance(t, torch.Tensor) and isinstance(t, nn.Parameter)
        )
        for fused in builder.fused:
            runtime.artifact.on_invalidate(fused.invalidate)
        return runtime

    def _device(self) -> torch.device:
        tensors = [t for t in self.inputs if isinstance(t, torch.Tensor)]
        parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
        return (parameters or tensors)[0].device if tensors else torch.device("cpu")

    def _roles(self) -> Any:
        from ditopt.runtime import InputRoles

        names = [
            None if item.role in ("parameter", "buffer") else item.name
            for item in self.captured.inputs[
                : len(self.captured.inputs) - len(self.captured.constants)
            ]
        ]
        if self.plan is None:
            return InputRoles.from_names(names, timestep=None, varying=())
        sampler = self.plan.sampler
        return InputRoles.from_names(names, timestep=sampler.timestep, varying=sampler.varying)

    def _check_plan(self, plan: Plan) -> None:
        from ditopt import fingerprint

        if self.root is None:
            self.record.decisions.append(
                Decision(
                    "model",
                    "plan",
                    False,
                    "the model was not found, so the plan's fingerprint is not checked",
                )
            )
            return
        found = {site.id for site in self.record.attention}
        if {site.id for site in plan.model.sites} <= found:
            sites = tuple(s for s in self.record.attention if s.form == "softmax")
        else:  # one of several graphs: the sites cannot be compared one by one
            sites = plan.model.sites
        notes = plan.validate_against(
            sites, fingerprint.architecture(self.root), fingerprint.weights(self.root)
        )
        for note in notes:
            warnings.warn(note, DitoptWarning, stacklevel=2)
            self.record.decisions.append(Decision("model", "plan", True, note))

    def _choices(self, plan: Plan, rules: Mapping[str, Any]) -> dict[str, Any]:
        """For each site that the plan names, its head patterns and layout, or why they cannot be used here."""
        from ditopt.infer_layout import site_geometry
        from ditopt.program import HeadChoice

        choices: dict[str, Any] = {}
        for site in self.record.attention:
            patterns = rules.get(site.id)
            if patterns is None:
                continue
            if self.captured.prefix:
                choices[site.id] = (
                    f"a graph break makes {self.captured.prefix} a graph of its own, which equal modules share"
                )
                continue
            grid: Any = self.record.grid
            if grid is None and plan.layout is not None:
                grid = (plan.layout.frames, plan.layout.height, plan.layout.width)
            geometry = (
                site_geometry(self.captured, site, grid)
                if grid is not None
                else "the token grid is unknown"
            )
            if isinstance(geometry, str):
                choices[site.id] = geometry
            else:
                choices[site.id] = HeadChoice(
                    tuple(patterns), geometry, grid, plan.block.q, plan.block.k
                )
        return choices

    def _schedule(self, plan: Plan) -> tuple[Any, Any]:
        from ditopt.runtime import StepSchedule
        from ditopt.stack import find_stack

        cache = plan.cache
        stack = None
        if cache is not None:
            found = find_stack(self.captured)
            missing = {site.id for site in plan.model.sites} - {
                site.id for site in self.record.attention
            }
            reason = (
                f"the model was captured in several graphs (this one lacks {min(missing)})"
                if missing
                else found
                if isinstance(found, str)
                else None
            )
            if reason is not None:
                self.record.decisions.append(Decision("model", "cache_blocks", False, reason))
                cache = None
            else:
                stack = found
                skipped = plan.sampler.calls - len(cache.full)
                blocks = f"{self.captured.pieces[stack.first].path} to {self.captured.pieces[stack.end - 1].path}"
                text = f"{skipped} of {plan.sampler.calls} calls forecast the output of {blocks}"
                self.record.decisions.append(Decision("model", "cache_blocks", True, text))
        calls = plan.sampler.calls
        schedule = StepSchedule.build(
            calls,
            cache.full if cache is not None else range(calls),
            cache.coefficients if cache is not None else {},
            timesteps=plan.sampler.timesteps or None,
            phases=[phase.calls for phase in plan.phases],
            branches=plan.sampler.branches,
        )
        if stack is None and len(plan.phases) > 1:
            stack = _whole(self.captured)
        return schedule, stack

    def _tracker(self, schedule: Any) -> Any:
        """One tracker for all graphs of a model under one plan, so that a recompilation does not lose the position."""
        from ditopt.runtime import TrajectoryTracker

        name = type(self.root).__name__ if self.root is not None else "model"
        if self.root is None:
            return TrajectoryTracker(schedule, model=name)
        by_plan = _trackers.setdefault(self.root, {})
        key = hash(self.plan)
        if key not in by_plan or by_plan[key].schedule != schedule:
            by_plan[key] = TrajectoryTracker(schedule, model=name)
        return by_plan[key]


def _whole(captured: Captured) -> Any:
    """Every piece as the part that differs between phases, where nothing is cached."""
    from ditopt.stack import Stack

    if not captured.pieces:
        raise CaptureError("the graph is empty, so a plan has nothing to choose")
    return Stack(
        0,
        len(captured.pieces),
        tuple(s for s in dict.fromkeys(captured.outputs) if isinstance(s, int)),
        (),
    )
