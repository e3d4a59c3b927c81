"""Record a model's calls during one sampling loop, by hooks on the module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.call_trace import Call, CallTrace, Input, build_trace, find_timestep
from ditopt.errors import WorkloadError

__all__ = ["Call", "CallRecorder", "CallTrace", "name_inputs", "record_calls"]


def name_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Each leaf of a call's arguments under its name in `module.forward`, None values left out.

    Members of dicts and sequences are named after their container: `added_cond_kwargs.resolution`.
    """
    signature = inspect.signature(module.forward)
    leaves: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            for key, member in value.items():
                leaves.update(_leaves(key, member))
        else:
            leaves.update(_leaves(name, value))
    return leaves


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _leaves(f"{name}.{key}", member)
    elif isinstance(value, list | tuple):
        for position, member in enumerate(value):
            yield from _leaves(f"{name}.{position}", member)
    elif value is not None:
        yield name, value


class CallRecorder:
    """Hooks on one module that note every call; `trace()` tells what they show."""

    def __init__(self, module: nn.Module, name: str = "model") -> None:
        self._module = module
        self._name = name
        self._inputs: list[dict[str, Input]] = []
        self._alive: list[Any] = []  # storage that is freed could come back as another tensor's

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the module's calls while the block runs; leaves no hook behind."""
        hooks = (
            self._module.register_forward_pre_hook(self._before, with_kwargs=True),
            self._module.register_forward_hook(self._after),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._alive.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            raise WorkloadError(
                f"the sampling loop calls {self._name!r} with gradients enabled",
                remedy="ditopt optimizes inference; run the model under torch.no_grad().",
            )
        leaves = name_inputs(module, args, kwargs)
        self._alive.append(leaves)
        self._inputs.append({name: _describe(value) for name, value in leaves.items()})

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for _, leaf in _leaves("output", output):
            if isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()):
                number = len(self._inputs) - 1
                at = find_timestep(self._inputs)
                value = "" if at is None else f" ({at} {self._inputs[-1][at].value})"
                raise WorkloadError(
                    f"{self._name!r} returned NaN or infinity at call {number}{value}",
                    remedy="Check the weights and the dtype; ditopt needs finite values.",
                )

    def trace(self) -> CallTrace:
        """What the calls so far show.

        Raises:
            WorkloadError: there was no call.
        """
        if not self._inputs:
            raise WorkloadError(
                f"the sampling loop never called {self._name!r}",
                remedy="sample(model, seed) must call the model that it is given.",
            )
        return build_trace(self._inputs)


def record_calls(module: nn.Module, run: Callable[[], Any], name: str = "model") -> CallTrace:
    """Run a sampling loop once and describe the calls of `module` in it.

    Args:
        module: the denoiser.
        run: runs the loop; its result is dropped.
        name: what to call the module in errors.

    Raises:
        WorkloadError: no call, gradients enabled, or a value that is not finite (says where).
    """
    recorder = CallRecorder(module, name)
    with torch.no_grad(), recorder.recording():
        run()
    return recorder.trace()


def _describe(value: Any) -> Input:
    if isinstance(value, Tensor):
        small = value.dim() <= 2 and value.numel() > 0 and not value.is_complex()
        number = float(value.max()) if small else None
        dtype = str(value.dtype).removeprefix("torch.")
        return Input(tuple(value.shape), dtype, _identity(value), number)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    identity = value if isinstance(value, int | float | str | bool) else repr(value)
    return Input(None, type(value).__name__, identity, float(value) if is_number else None)


def _identity(tensor: Tensor) -> Hashable:
    """Same storage, view and version. Inference tensors carry no version: their sum stands in."""
    version = tensor.sum().item() if tensor.is_inference() else tensor._version
    view = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (tensor.data_ptr(), *view, version)
