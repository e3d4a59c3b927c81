from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from ditopt.patterns import Band, Dense
from ditopt.plan import Gate
from ditopt.profiling.cost import timed_loops
from ditopt.runtime import (
    CudaGraphs,
    InputRoles,
    Programs,
    StepRuntime,
    StepSchedule,
    TrajectoryTracker,
    cache_bytes,
    session,
    stats,
)
from ditopt.runtime.counters import _artifacts_of
from ditopt.runtime.gate import Gate as RuntimeGate
from ditopt.runtime.static_inputs import Hold
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import Workload

from .small_dit import CACHE, arguments, plan_for, sample, small_dit
from .small_dit import TIMESTEPS as TIMESTEPS_DIT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIMESTEPS = [900.0, 700.0, 500.0, 300.0, 100.0]
LINEAR = StepSchedule.build(5, [0, 1, 3], {2: [2.0, -1.0], 4: [1.5, -0.5]}, timesteps=TIMESTEPS)
TOKENS = (1, 4608, 512)


def make_runtime() -> StepRuntime:
    programs = Programs(
        head=lambda inputs: ((inputs[0],), None),
        body=lambda inputs, carry, rest, phase: (carry[0] + inputs[1][0] / 1000,),
        tail=lambda inputs, outputs, rest: outputs[0],
        base=(0,),
        roles=InputRoles(timestep=1, varying=(0,), invariant=(2,)),
    )
    return StepRuntime(programs, LINEAR, TrajectoryTracker(LINEAR))


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def call(runtime: StepRuntime, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
    return runtime(x, t[None], text)


@pytest.mark.usefixtures("no_sync")
def test_counted_session_never_waits_for_the_device() -> None:
    runtime, text = make_runtime(), torch.ones(1, device="cuda")
    x = torch.randn(TOKENS, device="cuda", dtype=torch.bfloat16)
    timesteps = torch.tensor(TIMESTEPS, device="cuda")
    for run in range(3):
        if run == 1:  # the first run copies the coefficients to the device
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with session("a", calls=5):
            results = [call(runtime, x, t, text) for t in timesteps]
    torch.cuda.set_sync_debug_mode("default")
    assert runtime.artifact.counters.skipped == 6
    for t, result in zip(TIMESTEPS, results, strict=True):
        torch.testing.assert_close(result, x + t / 1000, atol=0.04, rtol=0)


@pytest.mark.usefixtures("no_sync")
def test_session_waits_only_in_the_first_two_calls() -> None:
    runtime, text = make_runtime(), torch.ones(1, device="cuda")
    x, timesteps = torch.randn(TOKENS, device="cuda"), torch.tensor(TIMESTEPS, device="cuda")
    with session("warm", calls=5):
        for t in timesteps:
            call(runtime, x, t, text)
    with session("b"):
        for i, t in enumerate(timesteps):
            if i == 2:
                torch.cuda.set_sync_debug_mode("error")
            call(runtime, x, t, text)
    torch.cuda.set_sync_debug_mode("default")
    assert runtime.artifact.counters.skipped == 4


@pytest.mark.usefixtures("no_sync")
def test_timed_loops_do_not_wait_for_the_device() -> None:
    model = small_dit("cuda", torch.bfloat16, width=128)
    given = arguments(model, size=(32, 32))
    plan, ahead = plan_for(model, given), []

    def loop(model: Any, seed: int) -> torch.Tensor:
        """The sampler; it keeps the device busy for half a second after a second loop's call 1."""
        calls = count()

        def denoiser(**inputs: Any) -> Any:
            if next(calls) == 2 and seed == 1:  # calls 0 and 1 of a session read the timestep
                torch.cuda.set_sync_debug_mode("error")
                torch.cuda._sleep(1_000_000_000)
            return model(**inputs)

        result = sample(denoiser, given)[-1]
        ahead.append(not torch.cuda.current_stream().query())
        torch.cuda.set_sync_debug_mode("default")
        return result

    first, second = timed_loops(Workload(model, loop), plan, [0, 1])
    assert ahead[1]  # also of `torch.cuda.synchronize`, which the debug mode does not see
    assert (first.full, first.skipped) == (second.full, second.skipped) == (3, 3)
    assert 0 < second.skip_ms < second.full_ms < 50  # without the half second


def test_stored_bytes_are_those_predicted() -> None:
    gc.collect()  # what earlier tests left must not be freed while bytes are counted
    runtime, text = make_runtime(), torch.ones(1, device="cuda")
    x = torch.randn(TOKENS, device="cuda", dtype=torch.bfloat16)
    held, before = [], torch.cuda.memory_allocated()
    for t in torch.tensor(TIMESTEPS, device="cuda"):
        call(runtime, x, t, text)
        held.append(torch.cuda.memory_allocated() - before)
    predicted = cache_bytes(LINEAR, [(TOKENS, torch.bfloat16)])
    assert predicted <= max(held) <= 1.05 * predicted
    assert held[-1] <= 0.01 * predicted  # the coefficients remain


# ---------------------------------------------------------------------------- CUDA graphs


def launches(function: Any) -> dict[str, int]:
    """How often a call launches graphs, and kernels and copies by themselves."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    return {
        "graphs": names.count("cudaGraphLaunch"),
        "others": sum(
            name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync"))
            for name in names
        ),
    }


@pytest.mark.parametrize("backend", ["ditopt_eager", "ditopt"])
@pytest.mark.parametrize("kind", ["none", "cached", "sparse"])
def test_graphs_give_the_same_bits(backend: str, kind: str) -> None:
    model = small_dit("cuda", torch.bfloat16, width=128)
    given = arguments(model, size=(32, 32))
    plan = None
    if kind == "cached":
        plan = plan_for(model, given)
    elif kind == "sparse":
        rules = {f"blocks.{n}#0": [Band(window=40), Dense()] for n in range(4)}
        plan = plan_for(model, given, attention=[((0, 2), {}), ((2, 6), rules)])
    torch.compiler.reset()
    options = {} if plan is None else {"plan": plan}
    plain = torch.compile(model, backend=backend, options=options)
    expected = [sample(plain, given) for _ in range(3)]
    torch.compiler.reset()
    fast = torch.compile(model, backend=backend, options={**options, "cuda_graphs": True})
    results = [sample(fast, given) for _ in range(3)]
    assert [torch.stack(r).tolist() for r in results] == [torch.stack(r).tolist() for r in expected]
    decided = [d for d in compiled_graphs(model)[-1].decisions if d.rule == "cuda_graphs"]
    assert decided
    assert all(d.applied for d in decided)
    if kind != "none":
        assert stats(model)["skipped_steps"] >= 9
    if kind == "sparse":  # of the full calls of a run, one is in the second phase: four blocks
        ran = [artifact.counters.kernels for artifact in _artifacts_of(model)]
        assert 12 in [kernels["block_sparse_attention"] for kernels in ran]
        assert all(kernels["block_sparse_attention"] in (0, 12) for kernels in ran)


def test_a_step_is_one_launch() -> None:
    model = small_dit("cuda", torch.bfloat16, width=128)
    given = arguments(model, size=(32, 32))
    plan = plan_for(model, given)
    torch.compiler.reset()
    fast = torch.compile(model, backend="ditopt", options={"plan": plan, "cuda_graphs": True})
    timesteps = list(torch.tensor(TIMESTEPS_DIT, device="cuda"))
    with torch.no_grad():
        for run in range(3):
            for call, t in enumerate(timesteps):
                given["timestep"] = t[None]
                with session(run, calls=6):
                    seen = launches(lambda: fast(**given))
                if run == 2:
                    assert seen["graphs"] == 1, (call, seen)
                    assert seen["others"] <= 6, (call, seen)


@pytest.mark.usefixtures("no_sync")
def test_graphs_never_wait_for_the_device() -> None:
    model = small_dit("cuda", torch.bfloat16, width=128)
    given = arguments(model, size=(32, 32))
    plan = plan_for(model, given)
    torch.compiler.reset()
    fast = torch.compile(model, backend="ditopt", options={"plan": plan, "cuda_graphs": True})
    timesteps = list(torch.tensor(TIMESTEPS_DIT, device="cuda"))
    for run in range(4):
        if run == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        with session(run, calls=6):
            sample(fast, given, timesteps)
    torch.cuda.set_sync_debug_mode("default")
    assert stats(model)["skipped_steps"] == 12


def test_new_weights_are_used() -> None:
    model = small_dit("cuda", torch.float32)
    given = arguments(model)
    torch.compiler.reset()
    fast = torch.compile(model, backend="ditopt", options={"cuda_graphs": True})
    with torch.no_grad():
        for change in ("none", "in_place", "data", "assign"):
            first = model.blocks[0].down
            if change == "in_place":
                first.weight.mul_(1.5)
                model.blocks[1].to_q.weight.mul_(1.5)  # part of a fused projection
            elif change == "data":
                first.weight.data.mul_(1.5)
            elif change == "assign":
                state = {name: value * 1.1 for name, value in model.state_dict().items()}
                model.load_state_dict(state, assign=True)
                model.requires_grad_(False)
            for _ in range(4):
                torch.testing.assert_close(fast(**given), model(**given), rtol=1e-4, atol=1e-5)


def test_resolutions_in_turn_and_results_that_are_kept() -> None:
    model = small_dit("cuda", torch.float32)
    torch.compiler.reset()
    fast = torch.compile(model, backend="ditopt", options={"cuda_graphs": True})
    kept = []
    with torch.no_grad():
        for round_ in range(4):
            for size in ((8, 8), (8, 16), (16, 8)):
                given = arguments(model, seed=round_, size=size)
                kept.append((fast(**given), model(**given)))
    for result, expected in kept:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_inference_mode() -> None:
    with torch.inference_mode():
        model = small_dit("cuda", torch.float32)
        torch.compiler.reset()
        fast = torch.compile(model, backend="ditopt", options={"cuda_graphs": True})
        for seed in range(4):
            given = arguments(model, seed=seed)
            torch.testing.assert_close(fast(**given), model(**given), rtol=1e-4, atol=1e-5)


def record(function: Any) -> tuple[Any, list[tuple[bool, str]]]:
    decisions: list[tuple[bool, str]] = []
    graphs = CudaGraphs(lambda applied, reason: decisions.append((applied, reason)))
    return lambda *args: graphs.run("full", function, args, [Hold.COPIED] * len(args)), decisions


def test_streams_take_turns() -> None:
    def slow(values: Any) -> Any:
        x = values[0]
        for _ in range(50):
            x = x @ x
            x = x / x.norm()
        return x

    run, _ = record(slow)
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [torch.randn(512, 512, device="cuda") for _ in range(12)]
    expected = [slow([x]) for x in inputs]
    torch.cuda.synchronize()
    results = []
    for n, x in enumerate(inputs):
        with torch.cuda.stream(streams[n % 3]):
            results.append(run(x))
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-5)


def test_threads_take_turns() -> None:
    run, _ = record(lambda values: values[0] * 2 + 1)
    wrong = []

    def work(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for n in range(50):
                x = torch.full((4096,), float(1000 * number + n), device="cuda")
                result = run(x)
                if not torch.equal(result, x * 2 + 1):
                    wrong.append((number, n))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_step_that_waits_for_the_device_runs_without_a_graph() -> None:
    run, decisions = record(lambda values: values[0] * values[0].sum().item())
    x = torch.ones(4, device="cuda")
    for n in range(1, 5):
        assert run(n * x).tolist() == [4.0 * n * n] * 4
    ((applied, reason),) = decisions
    assert not applied
    assert "it waits for the device, at test_cuda.py" in reason


def test_a_failed_recording_harms_nothing() -> None:
    def waits(values: Any) -> Any:
        torch.cuda.synchronize()  # the rehearsal cannot see this one
        return values[0] + 1

    run, decisions = record(waits)
    x, stream = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    for n in range(4):
        assert run(n * x).tolist() == [n + 1.0] * 4
    assert [applied for applied, _ in decisions] == [False]
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    run, decisions = record(lambda values: values[0] + 1)
    for n in range(4):
        assert run(n * x).tolist() == [n + 1.0] * 4
    assert [applied for applied, _ in decisions] == [True]


def test_inputs_on_the_cpu_are_declined() -> None:
    run, decisions = record(lambda values: values[0] * values[1])
    for n in range(4):
        assert run(torch.ones(2, device="cuda"), torch.tensor(float(n))).tolist() == [n] * 2
    assert [reason for _, reason in decisions] == [
        "a full step runs without a CUDA graph: one of its inputs lies on cpu"
    ]


@pytest.mark.parametrize("kind", ["first_block", "prediction", "input"])
@pytest.mark.parametrize("threshold", [1e-9, 1e9])
def test_gates_with_and_without_graphs_give_the_same_bits(kind: Any, threshold: float) -> None:
    model = small_dit("cuda", torch.bfloat16, width=128)
    given = arguments(model, size=(32, 32))
    cache = CACHE.model_copy(update={"gate": Gate(kind=kind, threshold=threshold)})
    plan, results, counted = plan_for(model, given, cache=cache), [], []
    for graphs in (False, True):
        torch.compiler.reset()
        options = {"plan": plan, "cuda_graphs": graphs}
        compiled = torch.compile(model, backend="ditopt", options=options)
        results.append([torch.stack(sample(compiled, given)) for _ in range(4)])
        counted.append(max(a.counters.overridden for a in _artifacts_of(model)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counted == ([12, 12] if threshold < 1 else [0, 0])


@pytest.mark.parametrize("gate", [None, "first_block"])
def test_extra_memory_of_a_compiled_model_is_that_predicted(gate: Any) -> None:
    model = small_dit("cuda", torch.bfloat16, width=512)
    given = arguments(model, size=(128, 128))
    cache = (
        CACHE if gate is None else CACHE.model_copy(update={"gate": Gate(kind=gate, threshold=9)})
    )
    plan = plan_for(model, given, cache=cache)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="ditopt", options={"plan": plan})
    tokens = [((1, 64 * 64, 512), torch.bfloat16)]
    made = RuntimeGate("first_block", 9.0) if gate else None
    schedule = StepSchedule.build(6, cache.full, cache.coefficients, gate=made)
    predicted = cache_bytes(schedule, tokens, signals=tokens if gate else ())
    with session("warm", calls=6):
        sample(compiled, given)
    held, before = [], torch.cuda.memory_allocated()
    with torch.no_grad(), session("measured", calls=6):
        for t in TIMESTEPS_DIT:
            given["timestep"].fill_(t)
            compiled(**given)
            held.append(torch.cuda.memory_allocated() - before)
    assert predicted <= max(held) <= 1.05 * predicted
    assert held[-1] <= 0.01 * predicted
