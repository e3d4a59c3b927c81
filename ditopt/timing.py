"""Time alone, in a loop or side by side, and peak memory, on the CPU or a CUDA device."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ditopt.progress import Progress, silent

T = TypeVar("T")

_RECOMPILE_LIMIT = 256


@dataclass(frozen=True)
class Spread:
    """Median, interquartile range and least of repeated measurements, in milliseconds.

    The least is what the work takes alone: whatever else the machine does only adds to it.
    """

    median_ms: float
    iqr_ms: float
    least_ms: float

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Spread:
        """The spread of at least one sample; a single one has none."""
        if len(samples_ms) == 1:
            return cls(samples_ms[0], 0.0, samples_ms[0])
        first, median, third = statistics.quantiles(samples_ms, n=4, method="inclusive")
        return cls(median, third - first, min(samples_ms))


def always_compiled() -> AbstractContextManager[None]:
    """While it is open Dynamo compiles every variant of a function.

    It counts the compilations of one function for all shapes and callers together, and past its
    limit of 8 it silently runs eager; a measurement must measure what it says.
    """
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=_RECOMPILE_LIMIT
    )
    return patched


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """The result of `run()` and its milliseconds, device work included."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return result, (time.perf_counter() - start) * 1e3


def timed_in_loop(run: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], float]]:
    """The result of `run()`, and what tells its milliseconds once the loop around it is over.

    In a loop the host runs ahead of a CUDA device; `timed` would hold it back at every call and
    add the latency of its launches. Here two events in the stream take the time. Where the device
    is behind, it is that of its work in `run`; where it is idle and the host the bottleneck, it is
    the host's, too. What either does between two calls belongs to none of them. Elsewhere it is
    the time that `timed` gives.

    Args:
        run: a call that works in the current stream.
        device: where it works.
    """
    if device.type != "cuda":
        result, elapsed_ms = timed(run)
        return result, lambda: elapsed_ms
    stream = torch.cuda.current_stream(device)
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record(stream)
    result = run()
    end.record(stream)

    def waited_ms() -> float:
        end.synchronize()
        return float(start.elapsed_time(end))

    return result, waited_ms


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    progress: Progress = silent,
) -> dict[str, Spread]:
    """Time several callables in turn, so that whatever else the machine does meets them all.

    Args:
        runs: what to time, by name.
        rounds: how often each is timed, one after the other in each round.
        warmup: untimed rounds before.
        progress: told after each timed round.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup):
        for run in runs.values():
            run()
    for number in range(rounds):
        for name, run in runs.items():
            samples[name].append(timed(run)[1])
        progress("timing", number + 1, rounds)
    return {name: Spread.of(values) for name, values in samples.items()}


def synchronize() -> None:
    """Wait for the CUDA device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """Largest memory in use since `start()`.

    On a CUDA device that is what tensors took; on Linux CPUs the process's resident set, everything
    else that the process holds included.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._known = False

    def start(self) -> None:
        """Forget the peak so far."""
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM alone
        except OSError:
            self._known = False  # another system, or a container that forbids it
        else:
            self._known = True

    def peak_bytes(self) -> int | None:
        """The peak, or None where the system does not tell."""
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        if not self._known:
            return None
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else None
