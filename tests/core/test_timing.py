import time

import pytest
import torch

from ditopt.timing import PeakMemory, Spread, time_interleaved, timed


def test_spread_is_median_interquartile_range_and_least():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 1.0)
    assert Spread.of([7.0]) == Spread(7.0, 0.0, 7.0)


def test_timed_gives_the_result_and_milliseconds():
    result, elapsed_ms = timed(lambda: time.sleep(0.02) or "done")
    assert result == "done"
    assert 20 <= elapsed_ms < 2000


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
