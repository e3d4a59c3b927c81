"""`Programs`: a lowered model around its block stack, and the kinds of step made of it.

The steps here are functions of tensors alone: what they launch depends on nothing but their
arguments' shapes, so that a CUDA graph can take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ditopt.runtime.gate import Gate, change
from ditopt.runtime.inputs import InputRoles

Tensors = Sequence[Tensor]


class Forecast(Protocol):
    """`forecast.forecast` or a compiled form of it."""

    def __call__(
        self, base: Tensor | None, residuals: Sequence[Tensor], coefficients: Tensor
    ) -> Tensor:
        """`base + sum_j coefficients[j] * residuals[j]`."""


Probe = Callable[[Sequence[Any], Tensors, Any, int], tuple[Tensors, Sequence[Tensor | None]]]


def _as_they_are(inputs: Sequence[Any], phase: int | None) -> Sequence[Any]:
    return inputs


@dataclass(frozen=True)
class Programs:
    """A lowered model: three programs around its block stack, and for some gates a fourth.

    Attributes:
        head: bound -> (carry, rest): what enters the block stack, and anything the others need.
        body: (bound, carry, rest, phase) -> outputs: the block stack, with the choices of a phase,
            from where `probe` has left it. It must not write into `carry`.
        tail: (bound, outputs, rest) -> the model's result. It may write into `outputs`.
        base: for each output of the body the index of the carried tensor, of the same shape and
            dtype, that the body adds to; None where there is none.
        roles: what the inputs mean to a sampling run.
        bind: (inputs, phase) -> bound: everything that the others read, the inputs first, then
            what the host keeps from call to call (derived weights, block lists) for a call of that
            phase, or for a skip call where the phase is None. All that depends on the host's state
            happens here: the others do the same work for the same shapes.
        probe: (bound, carry, rest, phase) -> (streams, bases): the first blocks, which run before
            the body, and for each stream the tensor before them that it continues, or None.
    """

    head: Callable[[Sequence[Any]], tuple[Tensors, Any]]
    body: Callable[[Sequence[Any], Tensors, Any, int], Tensors]
    tail: Callable[[Sequence[Any], Tensors, Any], Any]
    base: tuple[int | None, ...]
    roles: InputRoles = field(default_factory=InputRoles)
    bind: Callable[[Sequence[Any], int | None], Sequence[Any]] = _as_they_are
    probe: Probe | None = None


class Started(NamedTuple):
    """A call of which only the programs before the body have run.

    Attributes:
        carry, rest: what `Programs.head` returned.
        before: modification counters of `carry` before any block ran.
        probed: the first blocks' streams.
        signals: what the gate compares from call to call.
    """

    carry: Tensors
    rest: Any
    before: Sequence[int]
    probed: Tensors
    signals: Tensors


class Full(NamedTuple):
    """A full call.

    Attributes:
        result: the model's.
        stored: for later calls to combine: a residual (or output) for each output of the body,
            then the gate's signals. None unless asked for, or if they cannot be had.
        mutated: the body has overwritten its base, so that there is no residual.
    """

    result: Any
    stored: tuple[Tensor, ...] | None
    mutated: bool


def start(programs: Programs, bound: Sequence[Any], phase: int, gate: Gate | None) -> Started:
    """Run what comes before the body."""
    carry, rest = programs.head(bound)
    before, probed, signals = _versions(carry), carry, list(carry)
    if programs.probe is not None:
        probed, bases = programs.probe(bound, carry, rest, phase)
        streams = zip(probed, bases, strict=True)
        signals = [s.clone() if base is None else s - base for s, base in streams]
    return Started(carry, rest, before, probed, signals if gate is not None else ())


def run_full(
    programs: Programs,
    bound: Sequence[Any],
    *,
    phase: int = 0,
    store: bool = False,
    gate: Gate | None = None,
    started: Started | None = None,
) -> Full:
    """A whole call, or the rest of a started one."""
    if started is None:
        started = start(programs, bound, phase, gate if store else None)
    carry, rest = started.carry, started.rest
    outputs = programs.body(bound, carry, rest, phase)
    mutated = store and _versions(carry) != started.before
    stored = None
    if store and not mutated:
        # New storage for each: the tail and later calls may write into the outputs.
        stored = tuple(
            (output.clone() if base is None else output - carry[base]).detach()
            for output, base in zip(outputs, programs.base, strict=True)
        )
        fresh = gate is not None and gate.probes
        stored += tuple(s.detach() if fresh else s.detach().clone() for s in started.signals)
    return Full(programs.tail(bound, outputs, rest), stored, mutated)


def run_skip(
    programs: Programs,
    bound: Sequence[Any],
    history: Sequence[Tensors],
    rows: Tensors,
    forecast: Forecast,
    *,
    started: Started | None = None,
) -> Any:
    """A call with forecasts in the place of the block stack.

    Args:
        programs: the model.
        bound: what it reads.
        history: what earlier full calls have stored, newest first.
        rows: for each output of the body the coefficients, one for each of `history`.
        forecast: the weighted sum.
        started: the call, where a gate has begun it.
    """
    carry, rest = programs.head(bound) if started is None else (started.carry, started.rest)
    outputs = []
    for position, (base, row) in enumerate(zip(programs.base, rows, strict=True)):
        residuals = [stored[position] for stored in history]
        outputs.append(forecast(None if base is None else carry[base], residuals, row))
    return programs.tail(bound, outputs, rest)


def measure(
    programs: Programs, started: Started, gate: Gate, history: Sequence[Tensors], rows: Tensors
) -> Tensor:
    """What a gate decides by, a scalar; `history` and `rows` as in `run_skip`."""
    signals = [stored[len(programs.base) :] for stored in history]
    row = rows[0] if gate.kind == "prediction" else None
    return change(gate, started.signals, started.probed, signals, row)


def _versions(tensors: Tensors) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
