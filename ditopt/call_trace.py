"""What a model's calls during one sampling loop show: steps, guidance branches, what varies.

A sampling loop calls its model once or more per step. With sequential classifier-free guidance the
calls of a step differ in inputs that stay the same over the whole loop (the prompt embedding), and
each distinct combination of those is a *branch*. Nothing else is known about the sampler.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

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


def find_timestep(calls: Sequence[Mapping[str, Input]]) -> str | None:
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


def build_trace(calls: Sequence[Mapping[str, Input]]) -> CallTrace:
    """Sort inputs into varying and invariant, and calls into branches."""
    timestep = find_timestep(calls)
    times = [call[timestep].value if timestep and timestep in call else None for call in calls]
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


def _varies(inputs: Sequence[Input | None], steps: Sequence[int]) -> bool:
    """Whether an input takes more identities over the loop than it ever does within one step."""
    identities = [entry.identity if entry else None for entry in inputs]
    per_step: dict[int, set[Hashable]] = {}
    for step, identity in zip(steps, identities, strict=True):
        per_step.setdefault(step, set()).add(identity)
    return len(set(identities)) > max(len(seen) for seen in per_step.values())
