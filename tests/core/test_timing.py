from __future__ import annotations

import time

import pytest
import torch

from ditopt.timing import PeakMemory, Spread, time_interleaved, timed, timed_in_loop


def test_spread_is_median_interquartile_range_and_least():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 1.0)
    assert Spread.of([7.0]) == Spread(7.0, 0.0, 7.0)


def test_timed_gives_the_result_and_milliseconds():
    result, elapsed_ms = timed(lambda: time.sleep(0.02) or "done")
    assert result == "done"
    assert 20 <= elapsed_ms < 2000


def test_a_call_on_the_cpu_is_timed_at_once():
    result, elapsed_ms = timed_in_loop(lambda: time.sleep(0.02) or "done", torch.device("cpu"))
    time.sleep(0.05)
    assert result == "done"
    assert 20 <= elapsed_ms() == elapsed_ms() < 2000


class Machine:
    """A made-up host and CUDA device; `host` is the host's time, `free` when the device is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.host = self.free = 0.0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (self, device))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def launch(self, host_ms: float, device_ms: float):
        self.host += host_ms
        self.free = max(self.free, self.host) + device_ms

    def timed(self, host_ms: float, device_ms: float):
        return timed_in_loop(lambda: self.launch(host_ms, device_ms), torch.device("cuda", 1))[1]


class Event:
    def __init__(self, machine: Machine):
        self.machine = machine

    def record(self, stream: object):
        assert stream == (self.machine, torch.device("cuda", 1))
        self.at = max(self.machine.host, self.machine.free)

    def synchronize(self):
        self.machine.host = max(self.machine.host, self.at)

    def elapsed_time(self, end: Event):
        assert self.machine.host >= end.at, "the device has not come to the event yet"
        return end.at - self.at


def test_calls_that_the_device_comes_to_late_take_what_it_works(monkeypatch):
    machine = Machine(monkeypatch)
    full = machine.timed(2.0, 40.0)
    clocks = []
    for _ in range(4):
        clocks.append(machine.timed(1.5, 0.5))
        machine.launch(0.25, 7.0)  # the sampler's own work
    assert machine.host == 9.0  # nothing has waited for the device
    assert [elapsed_ms() for elapsed_ms in clocks] == [0.5] * 4
    assert full() == 42.0  # the device was idle when it began


def test_calls_that_keep_the_device_waiting_take_what_the_host_does(monkeypatch):
    machine = Machine(monkeypatch)
    clocks = []
    for _ in range(4):
        clocks.append(machine.timed(1.5, 0.5))
        machine.host += 3.0  # the sampler, on the host
    assert [elapsed_ms() for elapsed_ms in clocks] == [2.0] * 4


def test_runs_take_turns_after_the_warm_up():
    order, reported = [], []
    times = time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=2,
        warmup=1,
        progress=lambda *event: reported.append(event),
    )
    assert order == ["a", "b"] * 3
    assert reported == [("timing", 1, 2), ("timing", 2, 2)]
    assert list(times) == ["a", "b"]


def test_peak_memory_sees_what_was_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.peak_bytes()
    if before is None:
        pytest.skip("this system does not tell a process its peak memory")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.peak_bytes() >= before + (48 << 20)  # some pages may have been resident already
