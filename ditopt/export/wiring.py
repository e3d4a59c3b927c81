"""How an engine's programs make up a call of the model, as the manifest writes it down."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ditopt.export.schema import Name, Part, Slot


class Step(Part):
    """One use of a program.

    Attributes:
        program: index into the manifest's programs.
        inputs: for each argument a slot of the environment or the name of a stored tensor.
        outputs: slots that it fills.
        free: slots that nothing reads afterwards.
        kernels: number of block-sparse attentions in it.
    """

    program: Slot
    inputs: tuple[Slot | Name, ...]
    outputs: tuple[Slot, ...]
    free: tuple[Slot, ...] = ()
    kernels: Slot = 0


class Kept(Part):
    """Values that few inputs determine, computed once for each set of those inputs.

    Attributes:
        inputs: slots of these inputs.
        outputs: slots that the steps fill.
        steps: what computes them.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    steps: tuple[Step, ...]


class StackRecord(Part):
    """What a skipped call forecasts: the block stack's outputs and the slots they continue."""

    outputs: tuple[Slot, ...]
    bases: tuple[Slot | None, ...]


class Probe(Part):
    """What runs before a gate decides whether the rest of the block stack does.

    Attributes:
        cuts: for each phase, how many steps of its body run first.
        streams: slots that these fill, each with the slot that it continues.
    """

    cuts: tuple[Slot, ...]
    streams: tuple[tuple[Slot, Slot | None], ...]


class Wiring(Part):
    """How programs make up one call of the model.

    Slots: the inputs, then values of `kept`, then values between programs.

    Attributes:
        slots: how many there are.
        hoisted: how many of them are filled by `kept`.
        before, after: around the block stack, in every call.
        bodies: the block stack, for each phase of the plan.
        kept: what is computed once per prompt or timestep.
        kept_always: indices into `kept` that every call needs.
        kept_by_phase: for each phase, indices that a full call of it needs.
        stack: what a skipped call forecasts.
        probe: what a gate's decision needs; null without a gate, or where it needs nothing.
        returned: a slot for each tensor of the result.
    """

    slots: Slot
    hoisted: Slot = 0
    before: tuple[Step, ...]
    bodies: Annotated[tuple[tuple[Step, ...], ...], Field(min_length=1)]
    after: tuple[Step, ...]
    kept: tuple[Kept, ...] = ()
    kept_always: tuple[Slot, ...] = ()
    kept_by_phase: tuple[tuple[Slot, ...], ...]
    stack: StackRecord | None = None
    probe: Probe | None = None
    returned: tuple[Slot, ...]


class Schedule(Part):
    """The plan's calls, for runners that do not read plans; `ditopt` reads the plan itself.

    Attributes:
        phases: phase of each call.
        sources: for each call the (earlier full call, coefficient) pairs that it is forecast from;
            none for a full call.
        gated: whether a measured change may make more calls full than these; a runner that cannot
            measure it must refuse.
    """

    phases: tuple[Slot, ...]
    sources: tuple[tuple[tuple[Slot, float], ...], ...]
    gated: bool = False
