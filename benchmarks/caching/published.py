"""Published caches as released: what a static schedule of the whole stack's residual cannot say.

Plain PyTorch around the embedded model, for judging quality only. TeaCache and First-Block Cache
decide anew in each run; First-Block Cache computes the first block at skipped calls; TaylorSeer and
SmoothCache cache the output of every attention and MLP, and recompute modulation and gates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditopt.caching import relative_l1

MODULES = ("attn1", "attn2", "ff")
SHARES = {"attn1": 0.667, "attn2": 0.067, "ff": 0.266}
"""Of a block's arithmetic, at width 256, 2,048 tokens and an MLP of ratio 4."""


class Stack(nn.Module):
    """Stands for a model's blocks and owns one cache."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        self.call = 0
        self.full_calls = 0

    def run(self, x: Tensor, *more: Any, first: int = 0) -> Tensor:
        for block in list(self.blocks)[first:]:
            x = block(x, *more)
        self.full_calls += 1
        return x


class OnlineTeaCache(Stack):
    """First and last call in full; the input's rescaled change is added up in between."""

    def __init__(
        self, blocks: nn.ModuleList, calls: int, threshold: float, powers: tuple[float, ...]
    ) -> None:
        super().__init__(blocks)
        self.calls, self.threshold, self.powers = calls, threshold, powers
        self.total = 0.0

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rotary: Any) -> Tensor:
        block = self.blocks[0]
        shift, scale = (block.scale_shift_table + modulation).chunk(6, dim=1)[:2]
        now = block.norm1(x) * (1 + scale) + shift
        full = self.call in (0, self.calls - 1)
        if not full:
            self.total += float(np.polyval(self.powers, relative_l1(now, self.before)))
            full = not self.total < self.threshold
        self.before, self.call = now, self.call + 1
        if full:
            self.total = 0.0
            out = self.run(x, context, modulation, rotary)
            self.residual = out - x
        return x + self.residual


class OnlineFirstBlockCache(Stack):
    """The first block always runs; its residual's change since the last full call decides."""

    def __init__(self, blocks: nn.ModuleList, calls: int, threshold: float) -> None:
        super().__init__(blocks)
        self.threshold = threshold

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        hidden = self.blocks[0](x, *more)
        residual = hidden - x
        if self.call == 0 or not relative_l1(residual, self.reference) < self.threshold:
            self.reference = residual
            self.rest = self.run(hidden, *more, first=1) - hidden
        self.call += 1
        return hidden + self.rest


class Branch(nn.Module):
    """Stands for one attention or MLP: computes at full calls, forecasts at the others."""

    def __init__(self, module: nn.Module, clock: Stack, full: Collection[int], order: int) -> None:
        super().__init__()
        self.module, self.full, self.order = module, full, order
        self.clock = [clock]  # in a list, so that it is no submodule
        self.ladder: list[Tensor] = []
        self.newest = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self.clock[0].call
        if call in self.full:
            ladder = [self.module(*args, **kwargs)]
            for older in self.ladder[: self.order]:
                ladder.append((ladder[-1] - older) / (call - self.newest))
            self.ladder, self.newest = ladder, call
            return ladder[0]
        ahead = call - self.newest
        terms = [d * (ahead**i / math.factorial(i)) for i, d in enumerate(self.ladder)]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


class ModularCache(Stack):
    """TaylorSeer's and SmoothCache's form: full calls by the type of module."""

    def __init__(
        self, blocks: nn.ModuleList, full: Mapping[str, Collection[int]], order: int
    ) -> None:
        super().__init__(blocks)
        self.branches = [
            (block, name, Branch(getattr(block, name), self, full[name], order))
            for block in blocks
            for name in MODULES
        ]

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        for block, name, branch in self.branches:
            setattr(block, name, branch)
        try:
            out = self.run(x, *more)
        finally:
            for block, name, branch in self.branches:
                setattr(block, name, branch.module)
        self.call += 1
        return out


class ModuleRecorder(Stack):
    """SmoothCache's calibration: how much each type of module's output changes between calls."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__(blocks)
        self.seen: dict[tuple[int, str], list[Tensor]] = {}

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        hooks = []
        for number, block in enumerate(self.blocks):
            for name in MODULES:

                def note(_: Any, __: Any, out: Tensor, key: Any = (number, name)) -> None:
                    self.seen.setdefault(key, []).append(out.clone())

                hooks.append(getattr(block, name).register_forward_hook(note))
        try:
            return self.run(x, *more)
        finally:
            for hook in hooks:
                hook.remove()

    def changes(self, reach: int = 8) -> dict[str, Tensor]:
        """[T, T] by type, mean over blocks; further than `reach` calls apart: infinite."""
        found = {}
        for name in MODULES:
            outputs = [tensors for (_, kind), tensors in self.seen.items() if kind == name]
            calls = len(outputs[0])
            table = torch.full((calls, calls), math.inf, dtype=torch.float64)
            for s in range(calls):
                for t in range(s, min(calls, s + reach + 1)):
                    errors = [relative_l1(tensors[t], tensors[s]) for tensors in outputs]
                    table[s, t] = float(np.mean(errors))
            found[name] = table
        return found


@contextlib.contextmanager
def in_place_of_blocks(model: Any, make: Callable[[nn.ModuleList], Stack]) -> Iterator[Stack]:
    """The model with one stand-in for all its blocks."""
    blocks = model.blocks
    stack = make(blocks)
    model.blocks = nn.ModuleList([stack])
    try:
        yield stack
    finally:
        model.blocks = blocks
