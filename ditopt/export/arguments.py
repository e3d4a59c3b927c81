"""The arguments of an engine's call: bound to the model's signature, every tensor checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditopt.errors import EngineError
from ditopt.export.values import bind

if TYPE_CHECKING:
    from ditopt.export.schema import Call, InputSpec, TensorSpec


class Arguments:
    """What an engine takes.

    Args:
        call: the manifest's.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._signature = call.signature()
        self._known = {item.name for item in call.inputs} | set(call.fixed)

    def fit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in the order of the engine's slots, strided as it was made for.

        Raises:
            EngineError: an argument that the engine was not made for; names it.
        """
        named = bind(self._signature, args, kwargs)
        for name, expected in self._call.fixed.items():
            given = named.get(name)
            if isinstance(given, Tensor) or type(given) is not type(expected) or given != expected:
                raise EngineError(
                    f"{name}: the engine was exported with {expected!r}, got {_short(given)}",
                    remedy="Export another engine for this value.",
                )
        if named.keys() != self._known:
            for name in named.keys() - self._known:
                if named[name] is not None:
                    raise EngineError(f"{name}: the engine was exported without this argument")
        seen: dict[str, tuple[str, int]] = {}
        return [self._fit(item, named.get(item.name), seen) for item in self._call.inputs]

    def _fit(self, item: InputSpec, value: Any, seen: dict[str, tuple[str, int]]) -> Tensor:
        """An input; `seen` holds the open sizes so far, each with the input that showed it."""
        if not isinstance(value, Tensor):
            raise EngineError(f"{item.name}: expected a tensor {item.spec}, got {_short(value)}")
        spec = item.spec
        if item.axes and value.ndim == len(spec.shape):
            shape = list(spec.shape)
            for axis, name in item.axes:
                self._check_size(item, axis, name, value.shape[axis], seen)
                shape[axis] = value.shape[axis]
            spec = spec.of_shape(tuple(shape))
        return _placed(item, spec, value)

    def _check_size(
        self, item: InputSpec, axis: int, name: str, size: int, seen: dict[str, tuple[str, int]]
    ) -> None:
        if not self._call.sizes[name].holds(size):
            raise EngineError(
                f"{item.name}: axis {axis} ({name}) takes {self._call.sizes[name]}, got {size}",
                remedy="Export another engine for this size.",
            )
        other, known = seen.setdefault(name, (item.name, size))
        if known != size:
            raise EngineError(
                f"{item.name}: axis {axis} ({name}) has {size}, and {other} has {known}"
            )


def _placed(item: InputSpec, spec: TensorSpec, value: Tensor) -> Tensor:
    """The value with the strides of `spec`."""
    if tuple(value.shape) != spec.shape or value.dtype != spec.torch_dtype:
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise EngineError(
            f"{item.name}: the engine was exported for {spec}, got {found}",
            remedy="Export another engine for this size.",
        )
    if value.device.type != spec.device:
        raise EngineError(
            f"{item.name}: the engine takes it on {spec.device}, it is on {value.device}"
        )
    if value.stride() == spec.stride:
        return value
    fitted = torch.empty_strided(spec.shape, spec.stride, dtype=value.dtype, device=value.device)
    return fitted.copy_(value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, Tensor) else f"a tensor {list(value.shape)}"
    return text if len(text) <= 60 else f"{text[:57]}..."
