"""The `torch.compile` backends `ditopt` and `ditopt_eager`.

`torch.compile(model, backend="ditopt", options={"plan": "plan.yaml"})`: capture, passes, lowering,
and a callable that owns the steps. `ditopt_eager` is the same up to lowering and then runs by
PyTorch and the reference kernels.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from ditopt.config import Options
from ditopt.errors import ConfigError, DitoptWarning, PlanError, StrictModeError, did_you_mean
from ditopt.report import Decision

if TYPE_CHECKING:
    from ditopt.derived import DerivedWeights
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
        derived: weights that its programs read in place of the model's own.
    """

    root: Callable[[], nn.Module | None]
    attention: list[AttentionSite] = field(default_factory=list)
    linear: list[LinearSite] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)
    programs: int = 0
    grid: tuple[Any, Any, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    derived: DerivedWeights | None = None


log = logging.getLogger(__name__)

_compiled: list[Compiled] = []


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
    if parsed.cuda_graphs and parsed.inductor.get("triton.cudagraphs"):
        raise ConfigError(
            "cuda_graphs and Inductor's triton.cudagraphs exclude each other",
            remedy="Keep cuda_graphs: one graph holds a whole step, Inductor's would hold a part.",
        )
    if mode is None or mode == "default":
        return parsed
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ConfigError(f"unknown mode {mode!r}", remedy=did_you_mean(mode, known))
    inductor = {**known[mode], **parsed.inductor}
    # Ours hold a whole step; Inductor's would be one for each program.
    graphs = bool(inductor.pop("triton.cudagraphs", False)) or parsed.cuda_graphs
    return parsed.model_copy(update={"inductor": inductor, "cuda_graphs": graphs})


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Python's cycle collector waits: a graph is many small objects, and none of them is garbage.

    With Dynamo's objects around, each full collection takes a good part of a second.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_gc()
def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, backend_name: str
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Raises:
        PlanError: the plan belongs to another model.
        StrictModeError: strict mode, and something had to be given up.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    from ditopt.capture import capture
    from ditopt.linker import Linker
    from ditopt.pipeline import BACKENDS
    from ditopt.root import continued_from, find_root
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

    try:
        captured = capture(gm, prefix=_prefix(gm, example_inputs, root))
    except TensorifyScalarRestartAnalysis:  # Dynamo's own: it fixes a float's value and comes back
        raise
    except Exception as error:
        # Whatever torch cannot make functional (a higher-order operator, a new construct) still
        # runs, by the backend alone and with a word about what is lost.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else ""
        reason = f"capture: {type(error).__name__}: {cause}"
        log.debug("capture failed", exc_info=True)
        return _fall_back(gm, example_inputs, record, reason, options, backend_name)
    record.decisions += captured.decisions
    broken = continued_from() or captured.prefix
    if broken:
        reason = f"a graph break in {broken} splits the model: its steps cannot be cached"
        record.decisions.append(Decision("model", "one_graph", False, reason))
    record.pieces = [(piece.kind, piece.path) for piece in captured.pieces]
    record.attention, record.linear = find_sites(captured)
    record.seconds["capture"] = time.perf_counter() - started
    runtime = Linker(captured, example_inputs, record, options, root).link(backend)
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
        return (
            "training: gradients are enabled and parameters require them; "
            "ditopt optimizes inference only"
        )
    if root is None:
        return None
    hook = offload_hook(root)
    if hook is not None:
        return (
            f"CPU offload: {hook} moves the weights during the forward, "
            "so nothing may hold on to them"
        )
    if compiled_in_parts(root, tensors):
        return (
            "compile_repeated_blocks: all blocks share one compiled frame, "
            "so choices per layer are impossible"
        )
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

    patches = dict(options.inductor)
    if options.cuda_graphs:
        patches["triton.cudagraphs"] = True
    lowered = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return cast("Callable[..., Any]", lowered)


def _refuse_losses(record: Compiled) -> None:
    lost = [
        d for d in record.decisions if not d.applied and d.rule not in ("fuse_projections", "hoist")
    ]
    if lost:
        raise StrictModeError(
            "strict mode: " + "; ".join(f"{d.site} ({d.rule}): {d.reason}" for d in lost[:3]),
            remedy="`ditopt explain` lists every decision.",
        )
