"""Sampling loops around published shapes, and what is needed to cache them."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ditopt
from ditopt.caching import CacheSchedule
from ditopt.linker import Linker
from ditopt.plan import Hardware, ModelRecord, Phase, Plan, Sampler
from ditopt.search.exchange import ExchangeableModel, cache_section

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PUBLISHED = {"flux": 3.17, "dit-xl": 2.36, "wan": 4.14}
"""Speedups that Confidence-Gated Taylor (arXiv 2508.02240) reports."""

CALLS = {"flux": 24, "dit-xl": 24, "wan": 12}
"""Calls of a measured loop: enough for every share K/T, few enough for a minute of rounds."""


class Loop:
    """A sampler's loop around one published shape: x moves a little along the model's output."""

    def __init__(self, inputs: Mapping[str, Any], calls: int) -> None:
        self.inputs = dict(inputs)
        step = self.inputs["timestep"]
        if step.is_floating_point():
            values = [1.0 - k / calls for k in range(calls)]
        else:
            values = [999 - k * 980 // max(1, calls - 1) for k in range(calls)]
        self.timesteps = [torch.full_like(step, value) for value in values]
        self.sampler = Sampler(
            calls=calls,
            timestep="timestep",
            timesteps=tuple(float(t.flatten()[0]) for t in self.timesteps),
            varying=("hidden_states", "timestep"),
        )

    @property
    def calls(self) -> int:
        return len(self.timesteps)

    def __call__(
        self,
        model: Callable[..., Any],
        *,
        session: bool = True,
        after: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        x = self.inputs["hidden_states"]
        named = ditopt.session(calls=self.calls) if session else contextlib.nullcontext()
        with named:
            for call, step in enumerate(self.timesteps):
                out = model(**{**self.inputs, "hidden_states": x, "timestep": step})[0]
                x = x - 0.01 * out[:, : x.shape[1]]
                after(call)
        return x


def spread_pairs(calls: int, budget: int) -> CacheSchedule:
    """Even full calls, two of them at the start, and rows over two: for measuring speed."""
    rest = max(1, budget - 1)
    full = sorted({0, *(1 + k * (calls - 1) // rest for k in range(budget - 1))})
    rows = {call: (1.5, -0.5) for call in range(calls) if call not in full}
    return CacheSchedule(calls, tuple(full), rows)


def compiled(model: nn.Module, sampler: Sampler, backend: str) -> ExchangeableModel:
    """The model of random weights, compiled once; compiling happens at its first call."""
    plan = Plan(
        model=ModelRecord(architecture="0" * 64, weights="0" * 64, name="model", sites=()),
        sampler=sampler,
        hardware=Hardware(device="cuda", name="-", torch=torch.__version__, threads=1),
        phases=(Phase(calls=(0, sampler.calls)),),
        cache=cache_section(spread_pairs(sampler.calls, 2)),
    )
    return ExchangeableModel(model, plan, backend)


def unchecked() -> Any:
    """No fingerprints: hashing billions of random weights takes longer than compiling them."""
    return mock.patch.object(Linker, "_check", return_value=None)


def relative_l2(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def calls_for_speedup(speedup: float, calls: int, share: float) -> int:
    """Most full calls K with T / (K + (T - K) s) >= speedup; 0 where even one is too many."""
    return max(0, math.floor((calls / speedup - calls * share) / (1 - share) + 1e-9))


def bound(calls: int, full: int, share: float) -> float:
    """T / (K + (T - K) s)."""
    return calls / (full + (calls - full) * share)
