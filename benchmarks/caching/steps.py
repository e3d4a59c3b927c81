"""One full and one skipped call: right, how long, which kernels, how many bytes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from loops import Loop, relative_l2, spread_pairs
from torch import Tensor

import ditopt
from ditopt.caching import CacheSchedule
from ditopt.runtime import cache_bytes
from ditopt.timing import Spread, synchronize, timed

if TYPE_CHECKING:
    from ditopt.search.exchange import ExchangeableModel

OutputShapes = list[tuple[tuple[int, ...], torch.dtype]]


def gate(program: ExchangeableModel, loop: Loop, eager: Tensor, limit: float) -> dict[str, Any]:
    """Full calls against eager PyTorch; skip calls against the full call of the same inputs.

    With the inputs of the stored calls every forecast whose row sums to 1 is exact.
    """
    program.use(CacheSchedule(3, (0, 1), {2: (1.5, -0.5)}), timesteps=False)
    with ditopt.session(calls=3):
        outs = [program.model(**loop.inputs)[0] for _ in range(3)]
    errors = [relative_l2(outs[1], eager), relative_l2(outs[2], outs[1])]
    found = {
        "full_to_eager": errors[0],
        "skip_to_full": errors[1],
        "limit": limit,
        "counted": program.counted,
        "ok": program.counted == (2, 1) and all(error <= limit for error in errors),
    }
    print(f"  gate: {found}", flush=True)
    return found


def step_times(
    program: ExchangeableModel, loop: Loop, options: Callable[[], dict[str, Any]] = dict
) -> dict[str, float]:
    """Milliseconds of a full and of a skip call: waited for one by one, and in a row."""
    program.use(None, **options())
    loop(program.model)
    full = Spread.of([timed(lambda: program.model(**loop.inputs))[1] for _ in range(5)])
    full_row_ms = min(timed(lambda: loop(program.model))[1] for _ in range(2)) / loop.calls
    program.use(spread_pairs(loop.calls, 2), **options())
    loop(program.model)
    single: list[float] = []
    row_ms = []
    for repeat in range(4):
        clock = [0.0]

        def note(call: int, clock: list[float] = clock, wait: bool = repeat == 0) -> None:
            if call == 1 or wait or call == loop.calls - 1:
                synchronize()
                now = time.perf_counter()
                if wait and call > 2:
                    single.append((now - clock[0]) * 1e3)
                elif call == loop.calls - 1:
                    row_ms.append((now - clock[0]) * 1e3 / (loop.calls - 2))
                clock[0] = now

        loop(program.model, after=note)
    skip_row_ms = statistics.median(row_ms)
    return {
        "full_ms": full.median_ms,
        "full_iqr_ms": full.iqr_ms,
        "full_in_a_row_ms": full_row_ms,
        "skip_waited_ms": statistics.median(single),
        "skip_in_a_row_ms": skip_row_ms,
        "share_waited": statistics.median(single) / full.median_ms,
        "share": skip_row_ms / full_row_ms,
    }


def skip_kernels(program: ExchangeableModel, loop: Loop) -> dict[str, Any]:
    """The GPU kernels of one skip call, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    program.use(spread_pairs(loop.calls, 2))
    with ditopt.session(calls=loop.calls):
        for step in loop.timesteps[:4]:
            program.model(**{**loop.inputs, "timestep": step})
        synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            program.model(**{**loop.inputs, "timestep": loop.timesteps[4]})
            synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(events, key=lambda event: -event.device_time_total)[:12]
    return {
        "count": len(events),
        "ms": sum(event.device_time_total for event in events) / 1e3,
        "longest": [[e.name[:90], round(e.device_time_total / 1e3, 4)] for e in longest],
    }


def output_shapes(program: ExchangeableModel, loop: Loop) -> OutputShapes:
    """Shapes and dtypes of what the block stack returns."""
    found: OutputShapes = []
    program.use(None)
    runtime = program.runtimes[0]
    body = runtime.programs.body

    def noting(*args: Any) -> Any:
        outputs = body(*args)
        found[:] = [(tuple(output.shape), output.dtype) for output in outputs]
        return outputs

    runtime.programs = replace(runtime.programs, body=noting)
    program.model(**loop.inputs)
    runtime.programs = replace(runtime.programs, body=body)
    program.use(None)
    return found


def memory(
    program: ExchangeableModel, loop: Loop, schedule: CacheSchedule, outputs: OutputShapes
) -> dict[str, Any]:
    """Bytes of stored residuals, predicted before the run and measured against a loop in full."""
    predicted = cache_bytes(schedule.to_steps(), outputs)
    held: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for label, choice in (("full", None), ("planned", schedule)):
        program.use(choice)
        loop(program.model)
        gc.collect()
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, most = torch.cuda.memory_allocated(), [0]

        def note(_: int, start: int = start, most: list[int] = most) -> None:
            most[0] = max(most[0], torch.cuda.memory_allocated() - start)

        loop(program.model, after=note)
        held[label], peaks[label] = most[0], torch.cuda.max_memory_allocated() - start
    extra = held["planned"] - held["full"]
    return {
        "full_calls": len(schedule.full),
        "outputs": [[list(shape), str(dtype)] for shape, dtype in outputs],
        "predicted_bytes": predicted,
        "measured_bytes": extra,
        "ratio": extra / predicted,
        "peak_difference_bytes": peaks["planned"] - peaks["full"],
    }
