"""The bookkeeping of CUDA graphs, on a recorder that replays by calling the function again.

Like a real graph it reads and writes fixed memory, so a stale input or a result that is not cloned
shows in the numbers. Real graphs are tested in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from ditopt.runtime import CudaGraphs, StepRuntime, StepSchedule, TrajectoryTracker, count, session
from ditopt.runtime.counters import Counters, activate
from ditopt.runtime.recorder import CannotRecord
from ditopt.runtime.static_inputs import Hold

TIMESTEPS = [900.0, 700.0, 500.0, 300.0, 100.0]
LINEAR = StepSchedule.build(5, [0, 1, 3], {2: [2.0, -1.0], 4: [1.5, -0.5]}, timesteps=TIMESTEPS)


class Replayer:
    """Replays write into the memory of the first outputs, as a graph does."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.refused: str | None = None

    def refuse(self, tensor: Tensor) -> str | None:
        return self.refused

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        function()  # the rehearsal
        outputs = function()
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

        def replay() -> None:
            self.replayed += 1
            outer = activate(None)
            again = [leaf for leaf in pytree.tree_leaves(function()) if isinstance(leaf, Tensor)]
            activate(outer)
            for leaf, value in zip(leaves, again, strict=True):
                leaf.copy_(value)

        for leaf in leaves:
            leaf.fill_(float("nan"))  # recording computes nothing
        return outputs, replay

    def order(self) -> None:
        pass

    def settle(self) -> None:
        pass


class Graphs:
    """A `CudaGraphs` with its decisions, and x * weight + text as what it runs."""

    def __init__(self) -> None:
        self.recorder = Replayer()
        self.decisions: list[tuple[bool, str]] = []
        self.graphs = CudaGraphs(
            lambda applied, reason: self.decisions.append((applied, reason)),
            recorder=self.recorder,
        )

    def __call__(self, *arguments: Any, holds: Sequence[Hold], **options: Any) -> Any:
        def function(values: Sequence[Any]) -> Any:
            weight, x, text = values
            return {"sum": x * weight + text}, "plain"

        return self.graphs.run("full", function, arguments, holds, **options)


HOLDS = (Hold.IN_PLACE, Hold.COPIED, Hold.OWN)


def test_first_call_runs_second_records_third_replays() -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(2)
    for n in range(4):
        x = torch.full((2,), float(n))
        result, plain = graphs(weight, x, text, holds=HOLDS)
        assert torch.equal(result["sum"], 3 * x + 1)
        assert plain == "plain"
        assert graphs.recorder.recorded == (n >= 1)
        assert graphs.recorder.replayed == n
    assert graphs.decisions == [(True, "a full step is one CUDA graph")]


def test_results_of_earlier_calls_stay() -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(2)
    results = [
        graphs(weight, torch.full((2,), float(n)), text, holds=HOLDS)[0]["sum"] for n in range(4)
    ]
    assert [r.tolist() for r in results] == [[3.0 * n + 1] * 2 for n in range(4)]


def test_weights_changed_in_place_need_no_recording_and_moved_ones_do() -> None:
    graphs, weight, text, x = Graphs(), torch.tensor([3.0]), torch.ones(2), torch.ones(2)
    for _ in range(3):
        graphs(weight, x, text, holds=HOLDS)
    weight.mul_(2)
    assert graphs(weight, x, text, holds=HOLDS)[0]["sum"].tolist() == [7.0, 7.0]
    weight.data.mul_(2)  # leaves no trace
    assert graphs(weight, x, text, holds=HOLDS)[0]["sum"].tolist() == [13.0, 13.0]
    assert graphs.recorder.recorded == 1
    swapped = torch.tensor([5.0])
    for _ in range(3):
        assert graphs(swapped, x, text, holds=HOLDS)[0]["sum"].tolist() == [6.0, 6.0]
    assert graphs.recorder.recorded == 2


def test_weights_that_move_at_every_call_are_given_up() -> None:
    graphs, text, x, kept = Graphs(), torch.ones(2), torch.ones(2), []
    for n in range(12):
        kept.append(torch.tensor([float(n)]))  # keeps addresses apart
        assert graphs(kept[-1], x, text, holds=HOLDS)[0]["sum"].tolist() == [n + 1.0] * 2
    assert graphs.recorder.recorded == 8
    assert graphs.decisions[-1] == (
        False,
        "a full step runs without a CUDA graph: its weights have new addresses at every call",
    )


def test_what_the_host_keeps_is_read_in_place_until_it_moves() -> None:
    graphs, weight, x, kept = Graphs(), torch.tensor([3.0]), torch.ones(2), []
    holds = (Hold.IN_PLACE, Hold.COPIED, Hold.KEPT)
    for n in range(12):
        kept.append(torch.full((2,), float(n // 3)))
        assert graphs(weight, x, kept[-1], holds=holds)[0]["sum"].tolist() == [3 + n // 3] * 2
    assert graphs.recorder.recorded == 2
    assert len(graphs.decisions) == 1


def test_own_tensors_are_copied_when_they_are_others() -> None:
    graphs, weight, x = Graphs(), torch.tensor([3.0]), torch.ones(2)
    texts = [torch.zeros(2), torch.ones(2)]
    for n in (0, 0, 0, 1, 1, 0, 1):
        assert graphs(weight, x, texts[n], holds=HOLDS)[0]["sum"].tolist() == [3.0 + n] * 2
    texts[1].add_(1)  # its version tells
    assert graphs(weight, x, texts[1], holds=HOLDS)[0]["sum"].tolist() == [5.0, 5.0]
    texts[1].data.add_(1)  # nothing tells
    assert graphs(weight, x, texts[1], holds=HOLDS)[0]["sum"].tolist() == [5.0, 5.0]
    graphs.graphs.forget_copies()
    assert graphs(weight, x, texts[1], holds=HOLDS)[0]["sum"].tolist() == [6.0, 6.0]


def test_a_tensor_at_the_address_of_a_freed_one_is_copied() -> None:
    graphs, weight, x = Graphs(), torch.tensor([3.0]), torch.ones(2)
    for n in range(20):
        text = torch.full((2,), float(n))  # the allocator gives the same memory again
        assert graphs(weight, x, text, holds=HOLDS)[0]["sum"].tolist() == [3.0 + n] * 2
        del text


def test_inference_tensors_are_copied_at_each_call() -> None:
    graphs = Graphs()
    with torch.inference_mode():
        weight, x, text = torch.tensor([3.0]), torch.ones(2), torch.zeros(2)
        for n in range(5):
            assert graphs(weight, x, text, holds=HOLDS)[0]["sum"].tolist() == [3.0 + n] * 2
            text.add_(1)
    assert graphs(weight, x, text, holds=HOLDS)[0]["sum"].tolist() == [8.0, 8.0]


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(2.0).expand(3, 2),
        torch.arange(3.0)[:, None].expand(3, 2),
        torch.tensor(2.0).expand(2),
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(12.0)[::2].view(3, 2),
        torch.arange(4.0).unfold(0, 2, 1),
        torch.zeros(0, 2),
    ],
    ids=["rows", "columns", "scalar", "transposed", "gaps", "overlapping", "empty"],
)
def test_buffers_have_the_strides_of_the_argument(x: Tensor) -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(2)
    seen: list[tuple[int, ...]] = []

    def function(values: Sequence[Any]) -> Any:
        seen.append(values[1].stride())
        return values[1] * values[0] + values[2]

    for _ in range(3):
        result = graphs.graphs.run("full", function, (weight, x, text), HOLDS)
        assert torch.equal(result, x * 3 + 1)
    assert set(seen) == {x.stride()}
    assert graphs.recorder.recorded == 1


def test_other_shapes_values_and_variants_are_other_graphs() -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(1)
    for _ in range(3):
        for x in (torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float64), 2, 3.0):
            for variant in (1, 2):
                result = graphs(weight, x, text, holds=HOLDS, variant=variant)[0]["sum"]
                assert torch.equal(result, x * weight + text)
    assert graphs.recorder.recorded == 10


def test_the_least_recently_used_graph_goes_first() -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(1)
    for n in range(1, 34):
        graphs(weight, torch.ones(n), text, holds=HOLDS)
    graphs(weight, torch.ones(2), text, holds=HOLDS)
    assert graphs.recorder.recorded == 1
    graphs(weight, torch.ones(1), text, holds=HOLDS)
    assert graphs.recorder.recorded == 1  # forgotten: it runs as a first call does


def test_refusals_are_decided_once_and_it_runs_without() -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(2)
    graphs.recorder.refused = "one of its inputs lies on cpu"
    for _ in range(4):
        assert graphs(weight, text, text, holds=HOLDS)[0]["sum"].tolist() == [4.0, 4.0]
    assert graphs.decisions == [
        (False, "a full step runs without a CUDA graph: one of its inputs lies on cpu")
    ]


def test_a_step_that_cannot_be_recorded_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, weight, text = Graphs(), torch.tensor([3.0]), torch.ones(2)

    def fails(function: Callable[[], Any]) -> Any:
        raise CannotRecord("it waits for the device, at model.py:3")

    monkeypatch.setattr(graphs.recorder, "record", fails)
    for _ in range(4):
        assert graphs(weight, text, text, holds=HOLDS)[0]["sum"].tolist() == [4.0, 4.0]
    assert len(graphs.decisions) == 1
    assert graphs.decisions[0][1].endswith("model.py:3")


def test_gradients_switch_graphs_off() -> None:
    graphs, text = Graphs(), torch.ones(2)
    weight = torch.tensor([3.0], requires_grad=True)
    for _ in range(3):
        assert graphs(weight, text, text, holds=HOLDS)[0]["sum"].requires_grad
    with torch.no_grad():
        for _ in range(3):
            assert not graphs(weight, text, text, holds=HOLDS)[0]["sum"].requires_grad
    assert graphs.recorder.recorded == 1


def test_kernels_inside_a_graph_are_counted_at_each_replay() -> None:
    graphs, counters = Graphs(), Counters()

    def function(values: Sequence[Any]) -> Any:
        count("attention", 2)
        return values[0] + 1

    outer = activate(counters)
    try:
        for n in range(1, 6):
            graphs.graphs.run("full", function, (torch.ones(1),), (Hold.COPIED,))
            assert counters.kernels == {"attention": 2 * n}
    finally:
        activate(outer)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_any_order_of_arguments_gives_the_same_as_without_graphs(
    order: list[tuple[int, int, int]],
) -> None:
    graphs = Graphs()
    weights = [torch.tensor([float(n + 2)]) for n in range(3)]
    xs = [torch.full((2 + n % 2,), float(n)) for n in range(3)]
    texts = [torch.full((1,), n / 8) for n in range(3)]
    for w, x, text in order:
        result = graphs(weights[w], xs[x], texts[text], holds=HOLDS)[0]["sum"]
        assert torch.equal(result, xs[x] * weights[w] + texts[text])


@pytest.mark.parametrize("inference", [False, True])
def test_a_whole_run_of_skips_and_full_calls(
    make_fake: Callable[..., Any], inference: bool
) -> None:
    recorder = Replayer()
    fake = make_fake(LINEAR)
    graphs = CudaGraphs(lambda applied, reason: None, recorder=recorder)
    runtime = StepRuntime(fake.runtime.programs, LINEAR, TrajectoryTracker(LINEAR), graphs=graphs)
    with torch.inference_mode(inference):
        for run in range(3):
            text = torch.full((3,), 1.0 + run)
            with session(run):
                for t in TIMESTEPS:
                    x = torch.randn(1, 4)
                    # Its residual is linear in the timestep, so that every forecast is exact.
                    result = runtime(fake.weight, x, torch.tensor([t]), text)
                    torch.testing.assert_close(result, fake.dense(x, torch.tensor([t]), text))
    assert runtime.artifact.counters.skipped == 6
    # Two kinds, of 9 and 6 calls, each run once without a graph.
    assert (recorder.recorded, recorder.replayed) == (2, 13)


def test_residuals_outlive_the_replays_that_made_them(make_fake: Callable[..., Any]) -> None:
    fake = make_fake(LINEAR)
    graphs = CudaGraphs(lambda applied, reason: None, recorder=Replayer())
    runtime = StepRuntime(fake.runtime.programs, LINEAR, TrajectoryTracker(LINEAR), graphs=graphs)
    texts = [torch.full((3,), 1.0), torch.full((3,), 5.0)]
    for _ in range(2):
        for t in TIMESTEPS:
            for key, text in enumerate(texts):
                x, timestep = torch.randn(1, 4), torch.tensor([t])
                with session(key):
                    result = runtime(fake.weight, x, timestep, text)
                torch.testing.assert_close(result, fake.dense(x, timestep, text))
    assert runtime.artifact.counters.skipped == 8
