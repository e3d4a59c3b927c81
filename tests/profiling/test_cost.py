"""Costs: the lists that are timed, the plan that shows both kinds of call, medians."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.plan import Block, Hardware, ModelRecord, Sampler
from ditopt.profiling import cost
from ditopt.profiling.cost import every_second_call, measure_attention, timed_loops
from ditopt.profiling.schema import Profile, SiteShape
from ditopt.runtime import Artifact
from ditopt.workload import Workload

SHAPE = SiteShape(batch=1, heads=2, tokens=100, head_dim=8, dtype="float32")


def make_profile(calls: int) -> Profile:
    return Profile(
        model=ModelRecord(architecture="a" * 64, weights="b" * 64, name="Toy", sites=()),
        sampler=Sampler(calls=calls),
        hardware=Hardware(device="cpu", name="a CPU", torch="2", threads=1),
        layout=None,
        block=Block(q=16, k=16),
        options=(),
        shapes={},
        observed_calls=(0,),
        data_range=None,
        seeds=(0,),
    )


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.001])
def test_timed_lists_have_equal_rows_of_distinct_blocks(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    kept, counts, ids = cost._random_lists(SHAPE, Block(q=32, k=10), density, generator)
    assert kept == pytest.approx(max(1, round(density * 10)) / 10)
    assert counts.shape == (1, 2, 4)
    assert (counts == round(kept * 10)).all()
    for row in ids.reshape(-1, 10)[:, : int(counts[0, 0, 0])].tolist():
        assert row == sorted(set(row))


@pytest.mark.parametrize(("calls", "full"), [(1, None), (2, (0,)), (5, (0, 2, 4))])
def test_every_second_call_is_a_valid_plan(calls: int, full: tuple[int, ...] | None) -> None:
    plan = every_second_call(make_profile(calls))
    assert (plan.cache.full if plan.cache else None) == full


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * 2


def test_loops_are_timed_by_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up compiler and clock: skips take 1 ms, others 10; the first of each compiles."""
    model = Doubling().eval()
    made: dict[str, Any] = {"calls": 0}

    def compile_(module: nn.Module, backend: str, options: dict[str, Any]) -> Any:
        assert backend == "ditopt"
        assert "plan" in options

        def run(x: Tensor) -> Tensor:
            made.setdefault("artifact", Artifact(module.parameters()))
            made["artifact"].counters.ran(skipped=bool(made["calls"] % 2))
            made["calls"] += 1
            return module(x)

        return run

    def timed_in_loop(run: Any, device: torch.device) -> tuple[Any, Any]:
        assert device == torch.device("cpu")
        call = made["calls"]

        def elapsed_ms() -> float:
            assert made["calls"] == 12, "a clock was read before the last loop was over"
            return 500.0 if call < 2 else 1.0 if call % 2 else 10.0

        return run(), elapsed_ms

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(cost, "timed_in_loop", timed_in_loop)

    def sample(model: Any, seed: int) -> Tensor:
        x = torch.ones(1)
        for _ in range(6):
            x = model(x)
        return x

    first, second = timed_loops(Workload(model, sample), every_second_call(make_profile(6)), [0, 1])
    assert first.result.item() == second.result.item() == 64
    for loop in (first, second):
        assert (loop.full, loop.skipped, loop.full_ms, loop.skip_ms) == (3, 3, 10.0, 1.0)
    assert first.seconds == pytest.approx(0.033)


@pytest.mark.slow
def test_attention_is_timed_for_real() -> None:
    table = measure_attention(SHAPE, Block(q=16, k=16), torch.device("cpu"))
    assert table.dense_ms > 0
    assert table.sparse_ms[0][0] == 1.0
    assert all(ms > 0 for _, ms in table.sparse_ms)
    assert [kept for kept, _ in table.mean_ms] == [kept for kept, _ in table.sparse_ms]
    assert all(ms > 0 for _, ms in table.mean_ms)
    assert table.select_ms is not None
