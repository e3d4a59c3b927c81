"""What the profile seeds show: residuals as the search sees them, and the recipes' signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditopt import fingerprint
from ditopt.caching import RunSignals, Signals
from ditopt.observe import observe
from ditopt.plan import Block, Hardware, ModelRecord, Sampler
from ditopt.profiling.loops import observed_loop, plain_loop, sampler_of
from ditopt.profiling.observer import ProfileObserver
from ditopt.profiling.run import describe_hardware


@dataclass(frozen=True)
class Recording:
    """Everything known before schedules are sampled.

    Attributes:
        gram: [T, T] inner products of residuals, summed over the seeds.
        steps: [T] mean squared step of the sampler.
        signals: what published rules look at.
        sampler, model, hardware: for plans.
    """

    gram: Tensor
    steps: list[float]
    signals: Signals
    sampler: Sampler
    model: ModelRecord
    hardware: Hardware

    @property
    def calls(self) -> int:
        return self.sampler.calls


def record(workload: Any, seeds: Sequence[int]) -> Recording:
    """Sample the seeds under observation."""
    trace, _ = plain_loop(workload)
    sampler = sampler_of(trace)
    observer = ProfileObserver(None, Block(), sampler.calls, (), trace.branches, 1 << 32)
    observed = observe(workload.model, observer)
    records = [observed_loop(workload, seed, trace, observer, observed) for seed in seeds]
    torch.compiler.reset()
    return Recording(
        gram=torch.stack([one.gram for one in records]).sum(0),
        steps=torch.stack([one.step_energy for one in records]).mean(0).tolist(),
        signals=Signals.of_runs([_signals(workload, seed) for seed in seeds]),
        sampler=sampler,
        model=ModelRecord(
            architecture=fingerprint.architecture(workload.model),
            weights=fingerprint.weights(workload.model),
            name=type(workload.model).__name__,
            sites=tuple(observer.sites.values()),
        ),
        hardware=describe_hardware(next(workload.model.parameters()).device),
    )


def _signals(workload: Any, seed: int) -> RunSignals:
    """One run with hooks on the first and the last block."""
    run = RunSignals()
    seen: dict[str, Tensor] = {}
    first, last = workload.model.blocks[0], workload.model.blocks[-1]

    def entered(_: Any, args: Any) -> None:
        seen["base"] = args[0]

    def modulated(_: Any, args: Any) -> None:
        seen["modulated"] = args[0]

    def through_first(_: Any, args: Any, out: Tensor) -> None:
        seen["first"] = out - args[0]

    def through_last(_: Any, args: Any, out: Tensor) -> None:
        run.add(seen["modulated"], seen["first"], out - seen["base"])

    hooks = [
        first.register_forward_pre_hook(entered),
        first.attn1.register_forward_pre_hook(modulated),
        first.register_forward_hook(through_first),
        last.register_forward_hook(through_last),
    ]
    try:
        workload.run(seed)
    finally:
        for hook in hooks:
            hook.remove()
    return run
