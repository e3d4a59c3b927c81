"""Gates: what they measure, what they make full, and what is forecast from an irregular history."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ditopt.errors import PlanError
from ditopt.plan import Cache
from ditopt.plan import Gate as PlanGate
from ditopt.runtime import (
    CudaGraphs,
    Gate,
    InputRoles,
    Programs,
    StepRuntime,
    StepSchedule,
    TrajectoryTracker,
    cache_bytes,
    session,
    stats,
)
from ditopt.runtime.gate import change, read
from ditopt.runtime.history import sources_of
from ditopt.runtime.schedule import MAX_GAIN
from ditopt.torch_backend import compiled_graphs

from .small_dit import CACHE, arguments, plan_for, sample, shared_plan, small_dit
from .test_cuda_graphs import Replayer

TIMESTEPS = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0]
ROWS = {2: (2.0, -1.0), 3: (3.0, -2.0), 5: (4 / 3, -1 / 3), 6: (5 / 3, -2 / 3), 7: (2.0, -1.0)}


def scheduled(gate: Gate | None, **changes: Any) -> StepSchedule:
    """F F S S F S S S, straight lines."""
    return StepSchedule.build(8, [0, 1, 4], ROWS, timesteps=TIMESTEPS, gate=gate, **changes)


# ---------------------------------------------------------------------------- the measure


def draw(*seeds: int) -> list[Tensor]:
    return [
        torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]


def test_first_block_change_is_first_block_caches() -> None:
    now, newest, older = draw(0, 1), draw(2, 3), draw(4, 5)
    value = change(Gate("first_block", 0.1), now, draw(8, 9), [newest, older], None)
    expected = sum((a - b).abs().sum() for a, b in zip(now, newest, strict=True))
    assert float(value) == pytest.approx(float(expected / sum(b.abs().sum() for b in newest)))


def test_prediction_error_is_that_of_the_calls_own_row() -> None:
    now, newest, older, output = draw(0), draw(2), draw(4), draw(6)
    row = torch.tensor([1.5, -0.5], dtype=torch.float64)
    value = change(Gate("prediction", 0.1), now, output, [newest, older], row)
    error = (1.5 * newest[0] - 0.5 * older[0] - now[0]).abs().mean()
    assert float(value) == pytest.approx(float(error / output[0].abs().mean()))


def test_measures_are_taken_in_fp32() -> None:
    now, newest = draw(0), draw(2)
    exact = change(Gate("input", 0.1), now, now, [newest], None)
    half = [[t.bfloat16() for t in signals] for signals in (now, newest)]
    value = change(Gate("input", 0.1), half[0], half[0], [half[1]], None)
    wide = change(
        Gate("input", 0.1),
        *[[t.double() for t in half[0]]] * 2,
        [[t.double() for t in half[1]]],
        None,
    )
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(wide), rel=1e-6)
    assert float(value) == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.1001])
def test_nan_and_more_than_the_threshold_keep_the_gate_shut(value: float) -> None:
    gate = Gate("first_block", 0.1)
    assert gate.opens(0.1)
    assert not gate.opens(value)


def test_nothing_over_nothing_is_nan() -> None:
    zero = [torch.zeros(3)]
    assert math.isnan(change(Gate("first_block", 0.1), zero, zero, [zero], None))


# ---------------------------------------------------------------------------- the history


def test_the_planned_history_has_the_planned_row() -> None:
    schedule = scheduled(Gate("input", 0.1))
    assert sources_of(schedule, 3, {0, 1}) == ((1, 3.0), (0, -2.0))
    assert sources_of(schedule, 7, {0, 1, 4}) == ((4, 2.0), (1, -1.0))


def test_another_history_has_the_line_through_the_newest_two() -> None:
    schedule = scheduled(Gate("input", 0.1))
    assert sources_of(schedule, 3, {0, 1, 2}) == ((2, 2.0), (1, -1.0))
    assert sources_of(schedule, 7, {2, 4, 5}) == ((5, 3.0), (4, -2.0))
    assert sources_of(schedule, 7, {1, 5, 6}) == ((6, 2.0), (5, -1.0))
    reuse = scheduled(Gate("input", 0.1, order=0))
    assert sources_of(reuse, 7, {1, 5, 6}) == ((6, 1.0),)


def test_a_history_without_the_plans_newest_call_is_a_gap() -> None:
    schedule = scheduled(Gate("input", 0.1))
    assert sources_of(schedule, 5, {0, 1}) is None
    assert sources_of(schedule, 5, ()) is None
    assert sources_of(schedule, 5, {4}) == ((4, 1.0),)  # all that is there: it is reused


@given(
    stored=st.sets(st.integers(0, 30), min_size=1, max_size=8),
    ahead=st.integers(1, 10),
    order=st.integers(0, 3),
    polynomial=st.lists(st.integers(-3, 3), min_size=4, max_size=4),
)
def test_irregular_rows_are_exact_for_polynomials_and_bounded(
    stored: set[int], ahead: int, order: int, polynomial: list[int]
) -> None:
    call = max(stored) + ahead
    # A plan of which nothing but the first call is full: every other one is the gate's doing.
    schedule = StepSchedule.build(
        call + 1,
        [0],
        dict.fromkeys(range(1, call + 1), (1.0,)),
        gate=Gate("first_block", 0.1, order=order),
    )
    assume(stored != {0})
    sources = sources_of(schedule, call, stored)
    assert sources is not None
    assert [source for source, _ in sources] == sorted(stored, reverse=True)[: len(sources)]
    row = [c for _, c in sources]
    assert math.fsum(row) == pytest.approx(1, abs=1e-9)
    assert sum(map(abs, row)) <= MAX_GAIN
    assert len(row) <= order + 1
    degree = len(row) - 1

    def value(t: int) -> float:
        return math.fsum(c * t**k for k, c in enumerate(polynomial[: degree + 1]))

    forecast = math.fsum(c * value(source) for source, c in sources)
    assert forecast == pytest.approx(value(call), rel=1e-6, abs=1e-6)


# ---------------------------------------------------------------------------- the runtime


class Gated:
    """Two blocks, each adding text * f(t) with an f per block; the first one is the probe."""

    def __init__(
        self, gate: Gate, *, first: Callable[[Tensor], Tensor], graphs: bool = False, **changes: Any
    ) -> None:
        self.ran: list[str] = []
        self.first = first
        self.schedule = scheduled(gate, **changes)
        programs = Programs(
            head=self.head,
            body=self.body,
            tail=lambda bound, outputs, rest: outputs[0].clone(),
            base=(0,),
            roles=InputRoles(timestep=1, varying=(0,), invariant=(2,)),
            probe=self.probe if gate.probes else None,
        )
        self.tracker = TrajectoryTracker(self.schedule)
        self.recorder = Replayer()
        made = CudaGraphs(lambda applied, reason: None, recorder=self.recorder) if graphs else None
        self.runtime = StepRuntime(programs, self.schedule, self.tracker, graphs=made)
        self.text = torch.ones(1)

    def head(self, bound: Any) -> Any:
        self.ran.append("head")
        return [bound[0] * 1], {}

    def probe(self, bound: Any, carry: Any, rest: Any, phase: int) -> Any:
        self.ran.append("probe")
        rest["h"] = carry[0] + self.first(bound[1])
        return [rest["h"]], [carry[0]]

    def body(self, bound: Any, carry: Any, rest: Any, phase: int) -> Any:
        self.ran.append("body")
        return [rest.get("h", carry[0]) + bound[1] / 1000]

    def __call__(self, t: float, x: Tensor | None = None) -> str:
        """ "full", or "skip" when the body did not run; the counters are checked on the way."""
        counters = self.runtime.artifact.counters
        before = counters.full
        x = torch.full((4,), 10.0) if x is None else x
        self.result = self.runtime(x, torch.tensor([t]), self.text)
        return "full" if counters.full > before else "skip"

    def sample(self) -> list[str]:
        return [self(t) for t in TIMESTEPS]

    @property
    def counted(self) -> tuple[int, int]:
        counters = self.runtime.artifact.counters
        return counters.gated, counters.overridden


STATIC = ["full", "full", "skip", "skip", "full", "skip", "skip", "skip"]


def steady(t: Tensor) -> Tensor:
    return torch.ones(1)


def jumping(t: Tensor) -> Tensor:
    """Steady but from timestep 300 on."""
    return torch.where(t > 350, 1.0, 2.0)


@pytest.mark.parametrize("graphs", [False, True])
def test_first_blocks_run_once_before_the_decision(graphs: bool) -> None:
    model = Gated(Gate("first_block", 0.1), first=steady)
    assert model.sample() == STATIC
    assert model.counted == (5, 0)
    full, skip = ["head", "probe", "body"], ["head", "probe"]
    expected = [full if how == "full" else skip for how in STATIC]
    assert model.ran == [name for names in expected for name in names]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_change_makes_the_call_full_and_its_residual_is_the_next_reference(
    graphs: bool,
) -> None:
    model = Gated(Gate("first_block", 0.1), first=jumping, graphs=graphs)
    for run in range(3):
        model.text = torch.full((1,), float(run))
        seen = model.sample()
        # 300 differs from 500, 200 does not differ from 300.
        assert seen == [*STATIC[:6], "full", "skip"]
    assert model.counted == (15, 3)
    # Forecast at 200 from 300 and 500, two calls apart: the body's part lies on a line, the first
    # block's jump is continued.
    body, first = 0.2, 2.0 + 0.5
    torch.testing.assert_close(model.result, torch.full((4,), 10 + body + first))


def test_a_wrong_prediction_makes_the_call_full() -> None:
    ramp = Gated(Gate("prediction", 1e-3), first=lambda t: t / 1000)
    assert ramp.sample() == STATIC  # lines predict it, though it changes at each call
    assert ramp.counted == (5, 0)
    bent = Gated(Gate("prediction", 1e-3), first=lambda t: (t / 1000) ** 2)
    assert "full" in bent.sample()[5:]
    jump = Gated(Gate("prediction", 1e-3), first=jumping)
    # After the jump the line through both sides of it is wrong, too.
    assert jump.sample() == [*STATIC[:6], "full", "full"]


def test_input_change_needs_no_probe() -> None:
    model = Gated(Gate("input", 0.1), first=steady)
    xs = [10.0, 10.0, 10.5, 12.0, 12.0, 12.5, 13.0, 13.5]
    seen = [model(t, torch.full((4,), x)) for t, x in zip(TIMESTEPS, xs, strict=True)]
    # 12 is 20% from 10 (call 1); 13.5 is 12.5% from 12 (call 4).
    assert seen == ["full", "full", "skip", "full", "full", "skip", "skip", "full"]
    assert "probe" not in model.ran


def test_nan_runs_in_full() -> None:
    model = Gated(Gate("first_block", 0.1), first=lambda t: torch.where(t > 650, 1.0, math.nan))
    seen = model.sample()
    assert seen == ["full", "full", "skip", *["full"] * 5]
    assert model.counted == (5, 4)


def test_zero_residuals_decide_nothing_and_run_in_full() -> None:
    model = Gated(Gate("first_block", 0.1), first=lambda t: torch.zeros(1))
    assert model.sample() == ["full"] * 8


def test_calls_planned_in_full_stay_full_and_ask_no_gate() -> None:
    model = Gated(Gate("first_block", 1e9), first=jumping)
    assert model.sample() == STATIC
    assert model.counted == (5, 0)


def test_doubt_is_not_gated() -> None:
    model = Gated(Gate("first_block", 1e9), first=steady)
    model.sample()
    for call in range(4):
        model(TIMESTEPS[call])
    with pytest.warns(UserWarning, match="not in the plan's order"):
        assert model(123.0) == "full"
    assert model(TIMESTEPS[5]) == "full"
    assert model.counted == (7, 0)


def test_interleaved_requests_have_their_own_references() -> None:
    model = Gated(Gate("first_block", 0.1), first=jumping)
    texts = [torch.ones(1), torch.ones(1)]
    for tick in range(11):
        for key, text in enumerate(texts):
            call = tick - 3 * key
            if 0 <= call < 8:
                model.text = text
                with session(key):
                    assert model(TIMESTEPS[call]) == [*STATIC[:6], "full", "skip"][call]


@pytest.mark.parametrize("kind", ["first_block", "prediction", "input"])
def test_memory_is_bounded_however_many_calls_the_gate_makes_full(kind: Any) -> None:
    model, held = Gated(Gate(kind, 1e-9), first=lambda t: t.sqrt()), []
    for t in TIMESTEPS:
        model(t, torch.full((4,), t))
        (run,) = model.tracker._runs.values()
        (branch,) = run.branches.values()
        tensors = [r for stored in branch.residuals.values() for r in stored]
        held.append(sum(t.untyped_storage().nbytes() for t in tensors))
    signals = [((4,), torch.float32)]
    assert max(held) == cache_bytes(model.schedule, signals, signals=signals)
    assert held[-1] == 0


def test_exception_in_the_probe_drops_the_run() -> None:
    model = Gated(Gate("first_block", 0.1), first=steady)
    for t in TIMESTEPS[:2]:
        model(t)

    def fails(t: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    model.first = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        model(TIMESTEPS[2])
    model.first = steady
    assert model.sample() == STATIC


# ---------------------------------------------------------------------------- several ranks


def test_ranks_decide_by_the_largest_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    seen: list[Any] = []

    def all_reduce(value: Tensor, op: Any, group: Any) -> None:
        seen.append((float(value), op, group))
        value.clamp_(min=0.3)  # another rank's change

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(
        "torch.distributed.distributed_c10d._resolve_process_group", lambda name: f"group {name}"
    )
    assert read(torch.tensor(0.1), "0") == pytest.approx(0.3)
    assert read(torch.tensor(0.5), "0") == pytest.approx(0.5)
    assert read(torch.tensor(math.nan), "0") == math.inf
    assert {(op, group) for _, op, group in seen} == {(dist.ReduceOp.MAX, "group 0")}
    assert math.isnan(read(torch.tensor(math.nan), None))


def rank_main(rank: int, path: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    # Only rank 1 sees the jump.
    first = jumping if rank == 1 else steady
    model = Gated(Gate("first_block", 0.1, group=group.group_name), first=first)
    assert model.sample() == [*STATIC[:6], "full", "skip"]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_same_decisions(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(rank_main, (str(tmp_path / "ranks"),), nprocs=2)


# ---------------------------------------------------------------------------- plans


def gated_cache(**gate: Any) -> Cache:
    return Cache(
        full=CACHE.full,
        history=CACHE.history,
        coefficients=CACHE.coefficients,
        gate=PlanGate(**gate),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"kind": "third_block"}, "kind"),
        ({"blocks": 0}, "blocks"),
        ({"order": 4}, "order"),
        ({"colour": "red"}, "colour"),
        ({"kind": "input", "blocks": 1}, r"cache\.gate\.blocks: a gate on the input runs no block"),
    ],
)
def test_nonsense_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, PlanError), match=message):
        gated_cache(**{"kind": "first_block", "threshold": 0.1, **change})


def test_a_gate_without_calls_to_skip_is_refused() -> None:
    with pytest.raises(PlanError, match=r"cache\.gate: no call may skip"):
        Cache(full=(0, 1), gate=PlanGate(kind="input", threshold=0.1))


def test_a_plan_with_a_gate_survives_a_file(tmp_path: Path) -> None:
    plan = gated_plan(kind="prediction", threshold=0.01)
    plan.save(tmp_path / "plan.yaml")
    assert type(plan).load(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("first_block", marks=pytest.mark.slow),
        "prediction",
        pytest.param("input", marks=pytest.mark.slow),
    ],
)
def test_compiled_models_with_open_and_shut_gates(kind: str) -> None:
    model = small_dit()
    given = arguments(model)
    expected = sample(model, given)
    static = compile_with(model, shared_plan())
    skipping = sample(static, given)

    shut = gated_plan(kind=kind, threshold=1e-9)
    for result, wanted in zip(sample(compile_with(model, shut), given), expected, strict=True):
        assert torch.equal(result, wanted)
    opened = gated_plan(kind=kind, threshold=1e9)
    compiled = compile_with(model, opened)
    for result, wanted in zip(sample(compiled, given), skipping, strict=True):
        assert torch.equal(result, wanted)
    told = [d.reason for d in compiled_graphs(model)[-1].decisions if d.rule == "gate"]
    assert told == [
        "each of the 3 calls that may skip waits once for the device: a change of kind "
        f"{kind} over 1e+09 makes it full"
    ]
    assert stats(model)["gated_steps"] >= 3


def gated_plan(**gate: Any) -> Any:
    return shared_plan().model_copy(update={"cache": gated_cache(**gate)})


def compile_with(model: Any, plan: Any, backend: str = "ditopt_eager") -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend=backend, fullgraph=True, options={"plan": plan})


def test_more_blocks_than_there_are_leave_nothing_to_skip() -> None:
    model = small_dit()
    given = arguments(model)
    plan = gated_plan(kind="first_block", threshold=0.1, blocks=4)
    with pytest.raises(Exception, match=r"cache\.gate\.blocks: the stack has 4 blocks, so 4 leave"):
        sample(compile_with(model, plan), given)


@pytest.mark.slow
def test_inductor_programs_do_not_cross_the_probe() -> None:
    for threshold, overridden, limit in ((1e-9, 3, 1e-4), (1e9, 0, 0.1)):
        model = small_dit(layers=3)
        given = arguments(model)
        expected = sample(model, given)
        cache = gated_cache(kind="first_block", threshold=threshold, blocks=2)
        compiled = compile_with(model, plan_for(model, given, cache=cache), "ditopt")
        for result, wanted in zip(sample(compiled, given), expected, strict=True):
            assert float((result - wanted).abs().max()) < limit
        assert (stats(model)["gated_steps"], stats(model)["overridden_steps"]) == (3, overridden)
