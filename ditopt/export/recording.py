"""Calls of a denoiser, with their results, kept to compare another implementation with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from ditopt.workload import Workload


@dataclass(frozen=True)
class RecordedCall:
    """One call: its arguments and the result, both safe from later changes."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


class CallLog:
    """A callable in a denoiser's place that notes its calls.

    Args:
        model: what runs the calls.

    A tensor that comes back unchanged is the same object in every recorded call: a step runtime
    recognises a sampling run by its prompt tensors.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.calls: list[RecordedCall] = []
        self._model = model
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._alive: list[Tensor] = []  # a freed tensor's address could come back as another's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and note the call."""
        kept_args, kept_kwargs = pytree.tree_map(self._copy, (args, dict(kwargs)))
        result = self._model(*args, **kwargs)
        kept = pytree.tree_map(_detached, result)
        self.calls.append(RecordedCall(kept_args, kept_kwargs, kept))
        return result

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        version = 0 if value.is_inference() else value._version
        key = (value.data_ptr(), version, tuple(value.shape), value.stride(), value.dtype)
        if key not in self._copies:
            self._alive.append(value)
            self._copies[key] = _detached(value)
        return self._copies[key]


def _detached(value: Any) -> Any:
    """A copy outside of inference mode and autograd; it keeps the strides of dense tensors."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False), torch.no_grad():
        return value.detach().clone()


def record(
    workload: Workload,
    name: str,
    *,
    seed: int,
    model: Callable[..., Any] | None = None,
) -> Sequence[RecordedCall]:
    """The calls that the workload's loop makes of one of its denoisers.

    Args:
        workload: the model and its loop.
        name: of the denoiser; the others run as they are.
        seed: of the loop.
        model: what runs the calls, the denoiser itself by default.
    """
    log = CallLog(workload.models[name] if model is None else model)
    workload.run(seed, {**workload.models, name: log})
    return log.calls
