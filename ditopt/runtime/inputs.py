"""What the arguments of a compiled denoiser mean to a sampling run, and how they are compared."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter, mul
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_address, _version = torch.Tensor.data_ptr, attrgetter("_version")


@dataclass(frozen=True)
class InputRoles:
    """Argument positions of one compiled callable by their role in the denoising loop.

    Attributes:
        timestep: position of the timestep, a number or a tensor; None when there is none.
        varying: tensors with new values at each call (latents, ControlNet residuals).
        invariant: tensors and numbers that stay the same over one run (prompt, positions).
        weights: parameters and buffers.
    """

    timestep: int | None = None
    varying: tuple[int, ...] = ()
    invariant: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()

    @classmethod
    def from_names(
        cls, names: Sequence[str | None], *, timestep: str | None, varying: Collection[str]
    ) -> InputRoles:
        """Roles from argument names, None for weights; whatever is not named varying is invariant.

        The timestep may be listed among the varying inputs.
        """
        users = [(i, name) for i, name in enumerate(names) if name is not None]
        return cls(
            timestep=next((i for i, name in users if name == timestep), None),
            varying=tuple(i for i, name in users if name in varying and name != timestep),
            invariant=tuple(i for i, name in users if name not in varying and name != timestep),
            weights=tuple(i for i, name in enumerate(names) if name is None),
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one branch of one run from another, without reading a tensor's values.

    Attributes:
        shapes: shape and dtype of each varying, then of each invariant tensor.
        views: storage, address and stride of each invariant tensor; numbers (tensors without axes
            in host memory, too) by value.
        versions: in-place modification counter of each invariant tensor, or None when one of them
            is an inference tensor, which carries no counter.
        weights: addresses, then modification counters, of all weights (0.1 us each).
    """

    shapes: tuple[Any, ...]
    views: tuple[Any, ...]
    versions: tuple[int, ...] | None
    weights: tuple[int, ...]


def identify(inputs: Sequence[Any], roles: InputRoles) -> Identity:
    """The identity of a call, valid as long as `lease(inputs, roles)` is held."""
    shapes: list[Any] = []
    for position in roles.varying:
        value = inputs[position]
        shapes.append((value.shape, value.dtype) if isinstance(value, torch.Tensor) else value)
    views: list[Any] = []
    versions: list[int] | None = []  # None once an inference tensor is met
    for position in roles.invariant:
        value = inputs[position]
        if not isinstance(value, torch.Tensor):
            views.append(value)
            continue
        if _is_number(value):
            views.append(value.item())
            continue
        shapes.append((value.shape, value.dtype))
        views.append((value.untyped_storage()._cdata, value.data_ptr(), value.stride()))
        if value.is_inference():
            versions = None
        elif versions is not None:
            versions.append(value._version)
    return Identity(
        tuple(shapes),
        tuple(views),
        None if versions is None else tuple(versions),
        _weights([inputs[position] for position in roles.weights]),
    )


def _weights(weights: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A LoRA may be merged into a few layers only, so every weight is looked at."""
    addresses = map(_address, weights)
    try:
        return (*addresses, *map(_version, weights))
    except RuntimeError:  # inference tensors carry no counter
        counted = [weight._version for weight in weights if not weight.is_inference()]
        return (*map(_address, weights), *counted)


def lease(inputs: Sequence[Any], roles: InputRoles) -> tuple[StorageWeakRef, ...]:
    """Weak references to the invariant tensors' storages.

    While one is held the storage's address is not given to another storage, so equal addresses mean
    the same storage, however many view objects a pipeline makes of it. The memory is not kept.
    """
    values = (inputs[position] for position in roles.invariant)
    return tuple(
        StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
        for value in values
        if isinstance(value, torch.Tensor) and not _is_number(value)
    )


def _is_number(value: torch.Tensor) -> bool:
    """A number in host memory is known by its value: Dynamo wraps a Python float anew each call."""
    return value.is_cpu and not value.dim()


def on_host(timestep: Any) -> bool:
    """Whether a timestep can be read without waiting for an accelerator."""
    return timestep.is_cpu if isinstance(timestep, torch.Tensor) else True


def read_timestep(timestep: Any) -> float | None:
    """The one value of a timestep input, None when it holds several.

    Tokens at timestep 0 are clean conditioning (the first frame in image-to-video models, which
    take one timestep per token), so zeros beside another value do not count.
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    known = None if timestep.is_cpu else kept_values(timestep)
    if known is None:
        flat = timestep.detach().reshape(-1)
        if flat.numel() > 64:
            flat = flat.unique()  # type: ignore[no-untyped-call]
        known = flat.tolist()
    values = set(known)
    if len(values) > 1:
        values.discard(0)
    return float(values.pop()) if len(values) == 1 else None


# Samplers keep all timesteps of a run in one tensor and hand out views of it. Reading all of them
# at once costs one wait for the accelerator per run in the place of one per call.
_MOST_KEPT, _RUNS_KEPT = 4096, 8


@dataclass(frozen=True, slots=True)
class _Kept:
    """A host copy of the tensor that timesteps are views of; `lease` keeps its address its own."""

    lease: StorageWeakRef
    version: int
    dtype: torch.dtype
    values: list[float]

    def holds(self, timestep: torch.Tensor) -> bool:
        same = self.version == timestep._version and self.dtype == timestep.dtype
        return same and not self.lease.expired()  # type: ignore[no-untyped-call]


_kept: OrderedDict[int, _Kept] = OrderedDict()


def kept_values(timestep: torch.Tensor) -> list[float] | None:
    """The elements of a view of a larger tensor, from a host copy of that; None for other tensors.

    The copy is made again once the modification counter that views share has changed.
    """
    if timestep.is_inference() or timestep.numel() > 64:
        return None
    storage, size = timestep.untyped_storage(), timestep.element_size()
    elements = storage.nbytes() // size
    if not timestep.numel() < elements <= _MOST_KEPT:
        return None
    key = storage._cdata
    kept = _kept.get(key)
    if kept is None or not kept.holds(timestep):
        lease = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        everything = timestep.detach().as_strided((elements,), (1,), 0).tolist()
        kept = _kept[key] = _Kept(lease, timestep._version, timestep.dtype, everything)
        if len(_kept) > _RUNS_KEPT:
            _kept.popitem(last=False)
    offset, strides = timestep.storage_offset(), timestep.stride()
    indices = product(*map(range, timestep.shape))
    return [kept.values[offset + sum(map(mul, index, strides))] for index in indices]
