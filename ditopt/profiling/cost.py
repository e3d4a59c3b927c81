"""Measured costs on this machine: whole calls of the compiled model, and attention by density."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditopt.executors import preferred_executor
from ditopt.kernels.block_selection.api import select_blocks
from ditopt.kernels.block_sparse_attention.api import block_sparse_attention
from ditopt.kernels.block_sparse_attention.lists import Pooled
from ditopt.kernels.block_sparse_attention.pooling import block_means, dropped_bits, log_lengths
from ditopt.plan import Block, Cache, Phase, Plan
from ditopt.profiling.arithmetics import ARITHMETICS, arithmetic_runs
from ditopt.profiling.cost_cache import attention_table
from ditopt.profiling.loops import only_model
from ditopt.profiling.schema import AttentionCost, Costs, Profile, SiteShape
from ditopt.runtime import Skips
from ditopt.timing import always_compiled, time_interleaved, timed_in_loop

if TYPE_CHECKING:
    from ditopt.progress import Progress
    from ditopt.workload import Workload

_DENSITIES = (1.0, 0.5, 0.25, 0.1)
_ROUNDS = 7


def measure_costs(
    workload: Workload, profile: Profile, progress: Progress, *, again: bool = False
) -> Costs:
    """Time calls and attention; compiles the model once and the sparse executor once per shape.

    Tables of attention that this machine has measured before are taken from `cost_cache`, unless
    `again`; whole calls are always timed.
    """
    device = next(only_model(workload).parameters()).device
    attention, reused = [], 0
    shapes = sorted(set(profile.shapes.values()), key=lambda shape: shape.tokens)
    for number, shape in enumerate(shapes):
        measure = partial(measure_attention, shape, profile.block, device)
        table, known = attention_table(
            *(shape, profile.block, profile.hardware, measure), again=again
        )
        attention.append(table)
        reused += known
        progress("costs", number + 1, len(shapes) + 1)
    times = timed_loop(workload, every_second_call(profile), seed=0)
    progress("costs", len(shapes) + 1, len(shapes) + 1)
    return Costs(
        dense_call_ms=times.full_ms,
        skip_call_ms=times.skip_ms if times.skipped else times.full_ms,
        attention=tuple(attention),
        reused=reused,
    )


def every_second_call(profile: Profile) -> Plan:
    """A plan that shows both kinds of call: dense ones, and reuse of the call before."""
    calls = profile.sampler.calls
    odd = range(1, calls, 2)
    cache = Cache(full=tuple(range(0, calls, 2)), coefficients=dict.fromkeys(odd, (1.0,)))
    return Plan(
        model=profile.model,
        sampler=profile.sampler,
        hardware=profile.hardware,
        phases=(Phase(calls=(0, calls)),),
        cache=cache if odd else None,
    )


@dataclass(frozen=True)
class LoopTimes:
    """One sampling loop of a compiled model, call by call.

    Attributes:
        result: what the loop returned.
        full_ms: median time of calls that ran the block stack; first calls, which compile, aside.
        skip_ms: the same of calls that forecast it; 0 where there were none.
        full: number of calls that ran it.
        skipped: number of calls that forecast it.
    """

    result: Tensor
    full_ms: float
    skip_ms: float
    full: int
    skipped: int

    @property
    def seconds(self) -> float:
        """Time of the loop's calls without compilation; the sampler's own work is not in it."""
        return (self.full * self.full_ms + self.skipped * self.skip_ms) / 1e3


def timed_loop(workload: Workload, plan: Plan, seed: int) -> LoopTimes:
    """Compile a workload's model with a plan and time every call of one loop."""
    return timed_loops(workload, plan, [seed])[0]


def timed_loops(workload: Workload, plan: Plan, seeds: list[int]) -> list[LoopTimes]:
    """Compile a workload's model with a plan and time every call of one loop per seed.

    The loops run as they would without a clock: nothing here waits for a CUDA device before the
    last one is over (`timed_in_loop`).
    """
    model = only_model(workload)
    device = next(model.parameters()).device
    # Dynamo keeps a few compiled variants of one function and then falls back to eager for good.
    torch.compiler.reset()
    options: dict[str, Any] = {"plan": plan}
    compiled: Callable[..., Any] = torch.compile(model, backend="ditopt", options=options)
    clocks: dict[bool, list[Callable[[], float]]] = {False: [], True: []}
    skips = Skips(model)

    def denoiser(*args: Any, **kwargs: Any) -> Any:
        output, elapsed_ms = timed_in_loop(lambda: compiled(*args, **kwargs), device)
        clocks[skips.any_since()].append(elapsed_ms)
        return output

    loops = []
    for seed in seeds:
        full, skipped = len(clocks[False]), len(clocks[True])
        result = workload.run(seed, dict.fromkeys(workload.models, denoiser))
        loops.append((result, len(clocks[False]) - full, len(clocks[True]) - skipped))
    full_ms, skip_ms = (
        _median_after_first([elapsed_ms() for elapsed_ms in clocks[kind]]) for kind in (False, True)
    )
    return [LoopTimes(result, full_ms, skip_ms, *counts) for result, *counts in loops]


def _median_after_first(samples_ms: list[float]) -> float:
    return statistics.median(samples_ms[1:] or samples_ms or [0.0])


def measure_attention(shape: SiteShape, block: Block, device: torch.device) -> AttentionCost:
    """Time dense attention and the executors that a plan would get on random data, interleaved.

    Means of the dropped blocks are computed in each call, which of them a row sees beforehand. Of
    several rounds the least counts: a search compares times that were taken minutes apart.
    """
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(3))
    sparse = preferred_executor(q, shape.tokens, block.q, block.k)
    scale = shape.head_dim**-0.5
    runs: dict[str, Callable[[], Any]] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
    bias = log_lengths(shape.tokens, block.k, None, device)
    lists = {density: _random_lists(shape, block, density, generator) for density in _DENSITIES}
    for density, (_, counts, ids) in lists.items():
        on_device = (counts.to(device), ids.to(device))

        def run(on_device: tuple[Tensor, Tensor] = on_device) -> Any:
            return sparse(q, k, v, *on_device, block.q, block.k, scale)

        runs[str(density)] = run
        bits = dropped_bits(*on_device, -(-shape.tokens // block.k), None)

        def run_with_means(
            on_device: tuple[Tensor, Tensor] = on_device, bits: Tensor = bits
        ) -> Any:
            k_mean, v_mean = (block_means(x, block.k) for x in (k, v))
            pooled = Pooled(k_mean, v_mean, bias, bits)
            return block_sparse_attention(
                *(q, k, v, *on_device), block_q=block.q, block_k=block.k, scale=scale, pooled=pooled
            )

        runs[f"mean {density}"] = run_with_means
    runs["select"] = partial(
        select_blocks, q, k, block_q=block.q, block_k=block.k, rule="top_k", amount=0.25
    )
    runs |= arithmetic_runs(q, k, v, block)
    with torch.no_grad(), always_compiled():
        spreads = time_interleaved(runs, _ROUNDS)
    return AttentionCost(
        shape=shape,
        dense_ms=spreads["dense"].least_ms,
        sparse_ms=tuple(
            (kept, spreads[str(density)].least_ms) for density, (kept, _, _) in lists.items()
        ),
        mean_ms=tuple(
            (kept, spreads[f"mean {density}"].least_ms) for density, (kept, _, _) in lists.items()
        ),
        select_ms=spreads["select"].least_ms,
        arithmetic_ms={kind: spreads[kind].least_ms for kind in ARITHMETICS if kind in spreads},
    )


def _random_lists(
    shape: SiteShape, block: Block, density: float, generator: torch.Generator
) -> tuple[float, Tensor, Tensor]:
    """Block lists with equally long rows, and the density that they really have."""
    rows, columns = (-(-shape.tokens // size) for size in (block.q, block.k))
    count = max(1, round(density * columns))
    order = torch.rand(1, shape.heads, rows, columns, generator=generator).argsort(-1)
    ids = torch.zeros(order.shape, dtype=torch.int32)
    ids[..., :count] = order[..., :count].sort(-1).values
    counts = torch.full(order.shape[:-1], count, dtype=torch.int32)
    return count / columns, counts, ids
