"""An exported model and a plan, linked as `torch.compile` would link them, but not compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditopt.config import Options
from ditopt.export.compose import compose_sections
from ditopt.export.recorder import RecordingBackend
from ditopt.export.wire import Wired, Wirer
from ditopt.gating import runtime_gate
from ditopt.linker import Linker, plan_schedule
from ditopt.torch_backend import Compiled

if TYPE_CHECKING:
    from torch import nn

    from ditopt.export.door import Exported
    from ditopt.plan import Plan
    from ditopt.report import Decision
    from ditopt.runtime import StepSchedule


@dataclass(frozen=True)
class EngineParts:
    """What is stored of a linked model.

    Attributes:
        wired: programs, weights, and how they make up a call.
        schedule: the plan's calls, or None.
        cached: whether some of them are forecast.
        decisions: of every pass at every site.
    """

    wired: Wired
    schedule: StepSchedule | None
    cached: bool
    decisions: Sequence[Decision]


def link(
    exported: Exported,
    module: nn.Module,
    plan: Plan | None,
    holds_weights: bool,
) -> EngineParts:
    """Passes and programs as `torch.compile` would make them.

    A format whose programs hold their weights gets few of them: nothing is kept between calls.
    """
    from ditopt.sites import find_sites

    record = Compiled(root=lambda: module)
    record.attention, record.linear = find_sites(exported.captured)
    given = {"plan": plan, "hoist": not holds_weights}
    settings = Options.parse(given, {})
    linker = Linker(exported.captured, exported.values, record, settings, module)
    linker.link(RecordingBackend())
    assert linker.builder is not None
    assert linker.builder.linked is not None
    wired = Wirer(linker.builder, exported.values).run()
    if holds_weights:
        wired = compose_sections(wired)
    schedule, cached, stack = None, False, linker.builder.linked.stack
    if plan is not None:
        # Where nothing can be cached, phases still need a stack: everything, without bases.
        cached = plan.cache is not None and stack is not None and bool(stack.bases)
        gate = None
        if cached and plan.cache is not None and stack is not None:
            gate = runtime_gate(plan.cache, exported.captured, stack, None)
        schedule = plan_schedule(plan, gate, cached=cached)
    return EngineParts(wired, schedule, cached, record.decisions)
