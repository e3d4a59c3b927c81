"""Record a model's calls during one sampling loop: what varies from step to step, what does not.

A sampling loop calls its model once or more per step. With sequential classifier-free guidance the
calls of a step differ in inputs that stay the same over the whole loop (the prompt embedding), and
each distinct combination of those is a *branch*. Nothing else is known about the sampler.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditopt.errors import WorkloadError

if TYPE_CHECKING:
    from collections.abc import Hashable

_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "time", "noise_level")


@dataclass(frozen=True)
class Input:
    """One named input of one call.

    Attributes:
        shape: sizes of a tensor; None for a plain Python value.
        dtype: a tensor's dtype (`float32`) or a value's type (`int`).
        identity: equal for two inputs exactly when they are the same data, by storage, view and
            version for tensors and by value for plain values.
        value: a plain number, or the largest element of a tensor of at most two dimensions (some
            video models take one timestep per token); else None.
    """

    shape: tuple[int, ...] | None
    dtype: str
    identity: Hashable
    value: float | None


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        branch: number of its guidance branch, in order of first appearance.
        index: number of the call within its branch; plans count calls this way.
        timestep: value of the timestep input; None where there is no such input.
        inputs: every input by name (`hidden_states`, `added_cond_kwargs.resolution`).
    """

    branch: int
    index: int
    timestep: float | None
    inputs: Mapping[str, Input]


@dataclass(frozen=True)
class CallTrace:
    """The calls of one model during one sampling loop.

    Attributes:
        calls: every call, in order.
        timestep: name of the timestep input, or None where none was recognised; each call then
            counts as a step of its own, so guidance branches cannot be told apart.
        varying: names of the inputs that change from step to step, the timestep among them.
        invariant: names of the inputs that stay the same in each branch.
    """

    calls: tuple[Call, ...]
    timestep: str | None
    varying: tuple[str, ...]
    invariant: tuple[str, ...]

    @property
    def branches(self) -> int:
        """Number of guidance branches."""
        return 1 + max(call.branch for call in self.calls)

    def branch_calls(self, branch: int) -> tuple[Call, ...]:
        """The calls of one branch, in order."""
        return tuple(call for call in self.calls if call.branch == branch)

    @property
    def calls_per_branch(self) -> int:
        """Number of calls of the branch that has most of them."""
        return 1 + max(call.index for call in self.calls)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep of each call of the branch with most calls; empty without such an input."""
        longest = max(range(self.branches), key=lambda branch: len(self.branch_calls(branch)))
        return tuple(c.timestep for c in self.branch_calls(longest) if c.timestep is not None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor input at the first call."""
        inputs = self.calls[0].inputs.items()
        return {name: entry.shape for name, entry in inputs if entry.shape is not None}


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


def find_timestep(calls: list[dict[str, Input]]) -> str | None:
    """Name of the timestep input: one of its usual names, else the first that falls or rises."""
    candidates = [name for name, entry in calls[0].items() if entry.value is not None]
    for usual in _TIMESTEP_NAMES:
        if usual in candidates:
            return usual
    for name in candidates:
        values = [call[name].value for call in calls if name in call]
        known = [value for value in values if value is not None]
        scalar_like = len(calls[0][name].shape or ()) <= 1
        if scalar_like and len(set(known)) > 1 and sorted(known) in (known, known[::-1]):
            return name
    return None


def build_trace(calls: list[dict[str, Input]]) -> CallTrace:
    """Sort inputs into varying and invariant, and calls into branches."""
    timestep = find_timestep(calls)
    times = [call[timestep].value if timestep in call else None for call in calls]
    steps = [0]
    for previous, current in itertools.pairwise(times):
        steps.append(steps[-1] + (timestep is None or current != previous))

    names = sorted({name for call in calls for name in call})
    varying = tuple(
        name for name in names if name == timestep or _varies([c.get(name) for c in calls], steps)
    )
    invariant = tuple(name for name in names if name not in varying)
    branch_of: dict[Hashable, int] = {}
    counts: Counter[int] = Counter()
    records = []
    for call, time in zip(calls, times, strict=True):
        key = tuple(call[name].identity if name in call else None for name in invariant)
        branch = branch_of.setdefault(key, len(branch_of))
        records.append(Call(branch, counts[branch], time, call))
        counts[branch] += 1
    return CallTrace(tuple(records), timestep, varying, invariant)


def _varies(inputs: list[Input | None], steps: list[int]) -> bool:
    """Whether an input takes more identities over the loop than it ever does within one step."""
    identities = [entry.identity if entry else None for entry in inputs]
    per_step: dict[int, set[Hashable]] = {}
    for step, identity in zip(steps, identities, strict=True):
        per_step.setdefault(step, set()).add(identity)
    return len(set(identities)) > max(len(seen) for seen in per_step.values())
