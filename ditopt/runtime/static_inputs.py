"""Buffers at fixed addresses for the arguments of a CUDA graph, and how they are filled."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Hold(Enum):
    """How a graph reads one argument."""

    IN_PLACE = "in_place"
    """A weight: where it lies; recorded again when it moves."""
    KEPT = "kept"
    """Kept by the host between calls: where it lies, and once it has moved, like OWN."""
    OWN = "own"
    """Never written by the caller: from a copy, made again when it is another tensor."""
    COPIED = "copied"
    """From a copy that is made at each call."""


@dataclass(slots=True)
class _Buffer:
    """A static copy of the argument at `position`.

    Attributes:
        target: the copy, without the dimensions of stride 0, which `expanded` names.
        source: tensor, address and version of what it holds; None where that is not tracked.
    """

    position: int
    target: Tensor
    expanded: tuple[int, ...]
    source: tuple[weakref.ref[Tensor], int, int] | None = None

    def holds(self, value: Tensor) -> bool:
        if self.source is None or value.is_inference():
            return False
        reference, address, version = self.source
        return reference() is value and value.data_ptr() == address and value._version == version

    def remember(self, value: Tensor) -> None:
        # An inference tensor does not show when it changes.
        if not value.is_inference():
            self.source = weakref.ref(value), value.data_ptr(), value._version


@dataclass
class StaticInputs:
    """The arguments of one recorded step.

    Attributes:
        addresses: (position, address) of the tensors that are read in place.
    """

    addresses: list[tuple[int, int]] = field(default_factory=list)
    _copied: list[_Buffer] = field(default_factory=list)
    _own: list[_Buffer] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: Sequence[Any], holds: Sequence[Hold]) -> tuple[StaticInputs, list[Any]]:
        """Buffers for `arguments`, filled, and `arguments` with these in their places."""
        inputs, values = cls(), []
        for position, (value, hold) in enumerate(zip(arguments, holds, strict=True)):
            if isinstance(value, Tensor) and hold in (Hold.OWN, Hold.COPIED):
                buffer, value = _buffer_like(position, value)
                (inputs._own if hold is Hold.OWN else inputs._copied).append(buffer)
            elif isinstance(value, Tensor):
                inputs.addresses.append((position, value.data_ptr()))
            values.append(value)
        inputs.fill(arguments)
        return inputs, values

    def moved(self, arguments: Sequence[Any]) -> list[int]:
        """Positions of arguments that do not lie any more where the step reads them."""
        return [at for at, address in self.addresses if arguments[at].data_ptr() != address]

    def fill(self, arguments: Sequence[Any]) -> None:
        """Copy the arguments of a call into the buffers."""
        buffers = list(self._copied)
        for buffer in self._own:
            value = arguments[buffer.position]
            if not buffer.holds(value):
                buffers.append(buffer)
                buffer.remember(value)
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(
            lambda: ([], [])
        )
        for buffer in buffers:
            value = arguments[buffer.position].detach()
            for dimension in buffer.expanded:
                value = value.narrow(dimension, 0, 1)
            targets, values = by_dtype[value.dtype]
            targets.append(buffer.target)
            values.append(value)
        for targets, values in by_dtype.values():
            torch._foreach_copy_(targets, values)  # one launch for all

    def forget(self) -> None:
        """Copy everything at the next call."""
        for buffer in self._own:
            buffer.source = None


def _buffer_like(position: int, value: Tensor) -> tuple[_Buffer, Tensor]:
    """A buffer and the static tensor over it, with the strides of `value`."""
    static = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )
    expanded = tuple(
        d for d, (n, step) in enumerate(zip(value.shape, value.stride(), strict=True))
        if n > 1 and step == 0
    )  # fmt: skip
    target = static
    for dimension in expanded:
        target = target.narrow(dimension, 0, 1)
    return _Buffer(position, target, expanded), static
