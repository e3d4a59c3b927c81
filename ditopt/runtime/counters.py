"""Counters of what really ran, and the registry through which a model finds its artefacts."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# One lock for all counters: an increment is read, add, write, and requests may run in threads.
_lock = threading.Lock()


@dataclass
class Counters:
    """How often one compiled callable took each path.

    Attributes:
        calls: completed calls.
        full: calls that ran the block stack.
        skipped: calls that forecast it.
        doubts: calls in full compute though the plan says otherwise, by reason.
        gated: calls that a gate decided about.
        overridden: those of them that it ran in full.
        kernels: kernel launches by name, as told to `count`.
    """

    calls: int = 0
    full: int = 0
    skipped: int = 0
    gated: int = 0
    overridden: int = 0
    doubts: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def ran(self, *, skipped: bool, doubt: str | None = None, gated: bool | None = None) -> None:
        """Count one completed call; `gated` says whether a gate, if it was asked, overrode."""
        with _lock:
            self.calls += 1
            self.gated += gated is not None
            self.overridden += bool(gated)
            if skipped:
                self.skipped += 1
            else:
                self.full += 1
            if doubt is not None:
                self.doubts[doubt] += 1


class _Active(threading.local):
    counters: Counters | None = None


_active = _Active()


def activate(counters: Counters | None) -> Counters | None:
    """Make `count` count into `counters` in this thread; returns what was there, to put back."""
    outer, _active.counters = _active.counters, counters
    return outer


def count(kernel_name: str, times: int = 1) -> None:
    """Count launches of a kernel for the compiled callable that is running in this thread.

    Outside any compiled callable nothing is counted: there is no model to count it for.
    """
    counters = _active.counters
    if counters is not None:
        with _lock:
            counters.kernels[kernel_name] += times


class Artifact:
    """One compiled callable as `stats` and `invalidate` see it.

    Args:
        parameters: tensors of the model that it was compiled from, held weakly.

    Attributes:
        counters: what ran.
        root: the model itself, weakly; its parameters may all be replaced by others one day.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.counters = Counters()
        self.root: Callable[[], nn.Module | None] = lambda: None
        self._parameters: dict[int, weakref.ref[Tensor]] = {}
        self._callbacks: list[Callable[[], None]] = []
        self.own(parameters)
        _artifacts.add(self)

    def own(self, parameters: Iterable[Tensor]) -> None:
        """Add parameters; a callable may learn its real ones only when it is first called."""
        self._parameters.update((id(p), weakref.ref(p)) for p in parameters)

    def owns(self, parameters: Mapping[int, Tensor]) -> bool:
        """Whether it was compiled from any of these tensors, given by id."""
        common = self._parameters.keys() & parameters.keys()
        # An id may have been taken over by a new tensor, hence the reference.
        return any(self._parameters[key]() is parameters[key] for key in common)

    def on_invalidate(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the model's weights are declared changed."""
        self._callbacks.append(callback)

    def invalidate(self) -> None:
        """Drop caches and mark derived weights stale."""
        for callback in self._callbacks:
            callback()


_artifacts: weakref.WeakSet[Artifact] = weakref.WeakSet()


def stats(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, Any]:
    """What ran, summed over everything that was compiled from the model.

    Args:
        model: a module, what `torch.compile` made of it, or a mapping of names to modules.

    Returns:
        `calls`, `full_steps`, `skipped_steps` (numbers of calls of the model), `doubts` (reason to
        number of calls), `gated_steps` and `overridden_steps` (calls that a gate decided about, and
        those that it ran in full), `kernels` (name to number of launches) and `compiled` (how many
        compiled callables were found).
    """
    total = Counters()
    found = _artifacts_of(model)
    with _lock:
        for counters in (artifact.counters for artifact in found):
            total.calls += counters.calls
            total.full += counters.full
            total.skipped += counters.skipped
            total.gated += counters.gated
            total.overridden += counters.overridden
            total.doubts.update(counters.doubts)
            total.kernels.update(counters.kernels)
    return {
        "calls": total.calls,
        "full_steps": total.full,
        "skipped_steps": total.skipped,
        "gated_steps": total.gated,
        "overridden_steps": total.overridden,
        "doubts": {str(reason): n for reason, n in total.doubts.items()},
        "kernels": dict(total.kernels),
        "compiled": len(found),
    }


class Skips:
    """Which completed calls of a model forecast its block stack, asked after every one of them.

    `stats` looks for the model's artefacts each time, among all its parameters: a millisecond in
    which a loop's launches fall behind. Here they are looked for again only after calls that those
    already known did not count.

    Args:
        model: as for `stats`.
    """

    def __init__(self, model: nn.Module | Mapping[str, nn.Module]) -> None:
        self._model = model
        self._found = _artifacts_of(model)
        self._before = self._totals()

    def _totals(self) -> tuple[int, int]:
        counters = [artifact.counters for artifact in self._found]
        with _lock:
            return sum(c.calls for c in counters), sum(c.skipped for c in counters)

    def any_since(self) -> bool:
        """Whether a call was skipped since the last question."""
        calls, skipped = self._before
        self._before = self._totals()
        if self._before[0] == calls:
            self._found = _artifacts_of(self._model)
            self._before = self._totals()
        return self._before[1] > skipped


def invalidate(model: nn.Module | Mapping[str, nn.Module]) -> None:
    """Declare that the model's weights changed: stored residuals and derived weights are dropped.

    Needed only after changes that leave no trace on a tensor, such as `parameter.data.add_(...)`.

    Args:
        model: as for `stats`.
    """
    for artifact in _artifacts_of(model):
        artifact.invalidate()


def _artifacts_of(model: nn.Module | Mapping[str, nn.Module]) -> list[Artifact]:
    modules = model.values() if isinstance(model, Mapping) else (model,)
    parts = {id(part) for module in modules for part in module.modules()}
    parameters = {
        id(tensor): tensor
        for module in modules
        for tensors in (module.parameters(), module.buffers())
        for tensor in tensors
    }
    return [
        artifact
        for artifact in tuple(_artifacts)
        if artifact.owns(parameters) or id(artifact.root()) in parts
    ]
