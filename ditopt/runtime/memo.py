"""`Memo`: values that few inputs of a call determine, kept while those inputs come back.

A tensor is recognised by its storage, view and modification counter, never by `id`; small tensors
in host memory by their values. Inference tensors carry no counter, so what depends on them is kept
inside `ditopt.session` only. Nothing is read from an accelerator.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ditopt.runtime.counters import count
from ditopt.runtime.session import current_session, on_session_end

if TYPE_CHECKING:
    from ditopt.runtime.session import Session

MAX_BYTES = 1 << 30
"""Most memory that one memo keeps, least recently used values first to go."""

BY_VALUE = 64
"""Tensors in host memory of at most this many elements are recognised by their values."""

# Sets of inputs that one memo keeps. Tensors: the guidance branches of a few interleaved requests.
# Values: the timesteps of a few schedules.
_MOST_TENSORS, _MOST_VALUES = 8, 256

# After this many sets of inputs in a row that were gone before they came back, the inputs are taken
# to be new in each call. From then on they are looked at only once in a while.
_PATIENCE, _REST = 8, 64

_version = attrgetter("_version")


@dataclass(slots=True, eq=False)
class _Entry:
    """Kept values.

    Attributes:
        values: one for each output.
        leases: of the inputs' storages: their addresses are not given away while these are held.
        views, versions: the inputs as in the key.
        session: key of the session that they hold in, for inference tensors.
        nbytes: memory of the values.
    """

    values: tuple[Any, ...]
    leases: tuple[StorageWeakRef, ...]
    views: tuple[Hashable, ...]
    versions: tuple[int | None, ...]
    session: Hashable | None
    nbytes: int


@dataclass(slots=True)
class _Look:
    """What the inputs of a call look like; valid as long as their leases are held."""

    views: tuple[Hashable, ...]
    versions: tuple[int | None, ...]
    session: Hashable | None

    @property
    def key(self) -> Hashable:
        return self.views, self.versions, self.session


class Memo:
    """Keeps the results of one function of the environment of a call.

    Args:
        compute: environment -> values, one for each of `outputs`. It depends on the slots named
            below only, and gives values that nobody writes into.
        inputs: slots of tensors, sizes and numbers that the caller passes.
        weights: slots of parameters and buffers; a change of any drops everything.
        outputs: slots to fill.
        device: where the values are.
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], Sequence[Any]],
        *,
        inputs: Sequence[int],
        weights: Sequence[int],
        outputs: Sequence[int],
        device: torch.device,
    ) -> None:
        self.computed = 0
        self.reused = 0
        self._compute = compute
        self._inputs = tuple(inputs)
        self._weights = tuple(weights)
        self._outputs = tuple(outputs)
        self._device = device
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._total = 0  # bytes of the entries
        self._seen: tuple[Any, ...] | None = None
        self._owners: list[weakref.ref[Tensor]] = []
        self._fresh = 0
        self._resting = 0
        self._lock = threading.Lock()
        on_session_end(self)

    @property
    def nbytes(self) -> int:
        """Memory that is kept now."""
        with self._lock:
            return self._total

    def fill(self, env: list[Any]) -> None:
        """Put the values of this call into `env`, kept ones where the inputs are known."""
        for slot, value in zip(self._outputs, self._values(env), strict=True):
            env[slot] = value

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._drop(list(self._entries))
            self._seen = None

    def forget(self, key: Hashable) -> None:
        """Drop what holds in a session that has ended."""
        with self._lock:
            self._drop([n for n, entry in self._entries.items() if entry.session == key])

    def _values(self, env: list[Any]) -> Sequence[Any]:
        if self._resting:
            self._resting -= 1
            return self._run(env)
        look = self._look(env)
        if look is None:
            return self._run(env)
        key = look.key
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self._fresh = 0
        if entry is None:
            leases = tuple(map(_lease, self._tensors(env)))
            values = tuple(self._run(env))
            self._keep(
                key, _Entry(values, leases, look.views, look.versions, look.session, _size(values))
            )
            return values
        self.reused += 1
        count("hoisted.reused")
        return entry.values

    def _run(self, env: list[Any]) -> Sequence[Any]:
        self.computed += 1
        count("hoisted.computed")
        return self._compute(env)

    def _look(self, env: Sequence[Any]) -> _Look | None:
        """None where the inputs cannot be recognised again."""
        views: list[Hashable] = []
        if self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None  # a replay must compute from what the inputs hold by then
            # Another stream would not wait for the values.
            views.append(torch.cuda.current_stream(self._device).cuda_stream)
        versions: list[int | None] = []
        session: Session | None = None
        for slot in self._inputs:
            value = env[slot]
            if not isinstance(value, Tensor):
                views.append((type(value), value))
            elif by_value(value):
                views.append((value.dtype, value.shape, value.stride(), repr(value.tolist())))
            elif type(value) not in (Tensor, nn.Parameter) or value.dtype.is_complex:
                return None
            else:
                views.append(_view(value))
                if value.is_inference():
                    session = current_session()
                    if session is None:
                        return None
                    versions.append(None)
                else:
                    versions.append(value._version)
        if not self._follow(env) and session is None:
            session = current_session()
            if session is None:
                return None
        return _Look(tuple(views), tuple(versions), None if session is None else session.key)

    def _follow(self, env: Sequence[Any]) -> bool:
        """Drop everything if a weight has changed; False where one carries no counter."""
        weights = [env[slot] for slot in self._weights]
        try:
            versions: tuple[int, ...] | None = tuple(map(_version, weights))
        except RuntimeError:
            versions = None  # inference tensors
        seen = (tuple(map(id, weights)), tuple(map(Tensor.data_ptr, weights)), versions)
        if seen != self._seen:
            with self._lock:
                if self._entries:
                    self._tire()
                self._drop(list(self._entries))
                # The ids hold as long as the objects live.
                self._owners = [weakref.ref(weight, self._orphan) for weight in weights]
                self._seen = seen
        return versions is not None

    def _orphan(self, reference: weakref.ref[Tensor]) -> None:
        self._seen = None

    def _tensors(self, env: Sequence[Any]) -> list[Tensor]:
        values = (env[slot] for slot in self._inputs)
        return [v for v in values if isinstance(v, Tensor) and not by_value(v)]

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        with self._lock:
            # Values do not go out of date, and there may be hundreds of them.
            others = self._entries.items() if entry.leases else ()
            gone = [name for name, other in others if _is_over(other, entry)]
            self._drop(gone)
            if gone and not self._entries:
                self._tire()
            if self._resting or entry.nbytes > MAX_BYTES or self._seen is None:
                return
            self._drop([key])
            self._entries[key] = entry
            self._total += entry.nbytes
            most = _MOST_TENSORS if entry.leases else _MOST_VALUES
            while len(self._entries) > most or self._total > MAX_BYTES:
                self._drop([next(iter(self._entries))])

    def _drop(self, names: Sequence[Hashable]) -> None:
        for name in names:
            entry = self._entries.pop(name, None)
            if entry is not None:
                self._total -= entry.nbytes

    def _tire(self) -> None:
        """Nothing that was kept can come back; stop looking when that goes on."""
        self._fresh += 1
        if self._fresh >= _PATIENCE:
            self._fresh = _PATIENCE - 1
            self._resting = _REST


def by_value(value: Tensor) -> bool:
    """Whether a tensor is recognised by its values."""
    return value.is_cpu and value.numel() <= BY_VALUE


def _view(value: Tensor) -> Hashable:
    storage = value.untyped_storage()._cdata
    return storage, value.data_ptr(), value.shape, value.stride(), value.dtype


def _lease(value: Tensor) -> StorageWeakRef:
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def _is_over(entry: _Entry, newer: _Entry) -> bool:
    """Whether an entry's inputs were freed, or written to since."""
    if any(lease.expired() for lease in entry.leases):  # type: ignore[no-untyped-call]
        return True
    return entry.views == newer.views and entry.versions != newer.versions


def _size(values: Sequence[Any]) -> int:
    storages = {
        v.untyped_storage()._cdata: v.untyped_storage() for v in values if isinstance(v, Tensor)
    }
    return sum(storage.nbytes() for storage in storages.values())
