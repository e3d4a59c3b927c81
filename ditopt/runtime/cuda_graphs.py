"""CUDA graphs: a call of the model becomes one launch, where the host would be the bottleneck.

A step of a small model is a few hundred kernels of a few microseconds each, which the host cannot
launch as fast as they run. A graph is recorded once per kind of step (full in each phase, forecast)
and per set of input shapes, and then replayed. A recorded kernel reads fixed addresses, so:

- weights are read where they lie; when one moves (another LoRA, `load_state_dict(assign=True)`) the
  step is recorded again; a change in place needs nothing;
- what the caller passes is copied into buffers of the graph's own;
- what leaves a graph (the result, stored residuals) is cloned; what stays inside is not;
- all graphs of one compiled callable share a memory pool, and replay one after the other.

The first call of each kind runs as usual, which tunes, loads and allocates whatever that takes; the
second is recorded. A step that waits for the device cannot be recorded and goes on without a graph,
with a decision.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ditopt.runtime.counters import Counters, activate, count
from ditopt.runtime.recorder import CannotRecord, CudaRecorder
from ditopt.runtime.static_inputs import Hold, StaticInputs

# Recorded steps kept at once (kinds of step times resolutions), least recently used first to go.
_CAPACITY = 32

# Recordings of one step before it is given up: something of the model moves at every call.
_ATTEMPTS = 8


class Recorder(Protocol):
    """Records what a function launches; `recorder.CudaRecorder` outside of tests."""

    def refuse(self, tensor: Tensor) -> str | None:
        """Why a graph cannot read a tensor, or None."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The function's outputs and what writes them again, or `CannotRecord`."""

    def order(self) -> None:
        """Wait, on the device, for replays that another stream has begun."""

    def settle(self) -> None:
        """Wait for all replays."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recorded step: its inputs, what launches it, what it writes (tensors and plain values).

    `kernels` are the launches by name that `count` was told of while recording.
    """

    inputs: StaticInputs
    replay: Callable[[], None]
    outputs: list[Any]
    structure: pytree.TreeSpec
    kernels: dict[str, int]


@dataclass(slots=True)
class _Entry:
    """One kind of step at one set of shapes; `moved` are kept arguments that have moved."""

    graph: _Graph | None = None
    declined: bool = False
    attempts: int = 0
    moved: set[int] = field(default_factory=set)


class CudaGraphs:
    """Runs functions of tensors, by replay from the second call of each kind on.

    Args:
        decide: is told, as (applied, reason), what was recorded and what could not be.
        recorder: replaces the device's graphs in tests.
    """

    def __init__(
        self, decide: Callable[[bool, str], None], *, recorder: Recorder | None = None
    ) -> None:
        self._decide = decide
        self._recorder = recorder if recorder is not None else CudaRecorder()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def run(
        self,
        kind: str,
        function: Callable[[Sequence[Any]], Any],
        arguments: Sequence[Any],
        holds: Sequence[Hold],
        *,
        variant: Hashable = None,
    ) -> Any:
        """`function(arguments)`, by a graph where that is possible.

        Args:
            kind: name of the step for people.
            function: launches the same kernels whenever `kind`, `variant`, the shapes of its
                tensors and the values of its other arguments are the same. It returns tensors and
                plain values, in any nesting, and writes into none of its arguments.
            arguments: tensors and plain values.
            holds: how to read each tensor.
            variant: what else tells this step from others.
        """
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in arguments
        ):
            return function(arguments)
        key = (kind, variant, _signature(arguments, holds))
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._add(key)
            else:
                self._entries.move_to_end(key)
                graph = self._graph(entry, kind, function, arguments, holds)
                if graph is not None:
                    return self._replay(graph, arguments)
        return function(arguments)

    def forget_copies(self) -> None:
        """Copy everything again at the next call: something has changed without a trace."""
        with self._lock:
            for entry in self._entries.values():
                if entry.graph is not None:
                    entry.graph.inputs.forget()

    def _add(self, key: Hashable) -> None:
        self._entries[key] = _Entry()
        if len(self._entries) > _CAPACITY:
            self._recorder.settle()
            self._entries.popitem(last=False)

    def _graph(
        self,
        entry: _Entry,
        kind: str,
        function: Callable[[Sequence[Any]], Any],
        arguments: Sequence[Any],
        holds: Sequence[Hold],
    ) -> _Graph | None:
        """A graph that is right for these arguments, or None where there can be none."""
        if entry.declined:
            return None
        if entry.graph is not None:
            moved = entry.graph.inputs.moved(arguments)
            if not moved:
                return entry.graph
            self._recorder.settle()
            entry.graph = None
            entry.moved.update(moved)
        entry.attempts += 1
        try:
            if entry.attempts > _ATTEMPTS:
                raise CannotRecord("its weights have new addresses at every call")
            # Buffers that are inference tensors could not be written to outside of inference mode.
            with torch.inference_mode(mode=False), torch.no_grad():
                entry.graph = self._record(entry, function, arguments, holds)
        except CannotRecord as problem:
            entry.declined = True
            self._decide(False, f"a {kind} step runs without a CUDA graph: {problem}")
            return None
        if entry.attempts == 1:
            self._decide(True, f"a {kind} step is one CUDA graph")
        return entry.graph

    def _record(
        self,
        entry: _Entry,
        function: Callable[[Sequence[Any]], Any],
        arguments: Sequence[Any],
        holds: Sequence[Hold],
    ) -> _Graph:
        for value in arguments:
            problem = self._recorder.refuse(value) if isinstance(value, Tensor) else None
            if problem is not None:
                raise CannotRecord(problem)
        inputs, values = StaticInputs.of(
            arguments,
            [
                Hold.OWN if hold is Hold.KEPT and at in entry.moved else hold
                for at, hold in enumerate(holds)
            ],
        )
        launched = Counters()

        def launch() -> Any:
            launched.kernels.clear()  # a recorder may run it several times
            return function(values)

        outer = activate(launched)
        try:
            made, replay = self._recorder.record(launch)
        finally:
            activate(outer)
        outputs, structure = pytree.tree_flatten(made)
        return _Graph(inputs, replay, outputs, structure, dict(launched.kernels))

    def _replay(self, graph: _Graph, arguments: Sequence[Any]) -> Any:
        self._recorder.order()
        graph.inputs.fill(arguments)
        graph.replay()
        for name, times in graph.kernels.items():
            count(name, times)
        values = [value.clone() if isinstance(value, Tensor) else value for value in graph.outputs]
        return pytree.tree_unflatten(values, graph.structure)


def _signature(arguments: Sequence[Any], holds: Sequence[Hold]) -> Hashable:
    """Shapes of the tensors that vary from call to call, and plain values."""
    return tuple(
        (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
        for value, hold in zip(arguments, holds, strict=True)
        if hold is not Hold.IN_PLACE
    )
