"""Plans in engines: 8-bit layers, gates and orders of tokens; on graphs, not native programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.small_dit import CACHE, arguments, plan_for, sample
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ditopt
from ditopt.errors import EngineError, VerificationError
from ditopt.export import compare
from ditopt.export.compose import compose_sections
from ditopt.export.link import link
from ditopt.export.manifest import Manifest
from ditopt.export.recording import record
from ditopt.export.run import export
from ditopt.export.verify import worst_error
from ditopt.export.wire import Wired
from ditopt.plan import Gate, Plan
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import Workload

from .engines import SPARSE, exported, in_memory, text_of, with_int8, workload_of


def against_oracle(engine: Any, workload: Workload, plan: Plan) -> float:
    torch.compiler.reset()
    options: Any = {"plan": plan}
    model = workload.models["model"]
    compiled = torch.compile(model, backend="ditopt_eager", options=options)
    calls = record(workload, "model", seed=0, model=compiled)
    with torch.no_grad():
        return max(worst_error(engine(**call.kwargs), call.result) for call in calls)


@pytest.fixture(scope="module")
def rounded(workload: Workload, plan: Plan, model: nn.Module) -> Plan:
    return with_int8(plan, model, arguments(model))


def test_8_bit_layers_are_stored_as_8_bits_and_need_no_operator_of_ours(
    workload: Workload, rounded: Plan, model: nn.Module
) -> None:
    """Where every phase rounds a layer, its weight is not stored beside its numbers."""
    rules = rounded.phases[-1].linear
    phases = tuple(p.model_copy(update={"linear": rules}) for p in rounded.phases)
    everywhere = rounded.model_copy(update={"phases": phases})
    engine = in_memory(workload, everywhere)
    assert against_oracle(engine, workload, everywhere) < 1e-6
    stored = {name: v for name, v in engine.manifest.tensors.items() if v.dtype == "int8"}
    assert len(stored) == 3 * 5  # a block's q, k and v are one
    assert not any("up.weight" in name for name in engine.manifest.tensors)
    wired = link(exported(workload), model, everywhere, False).wired
    nodes = [str(node.target) for gm in wired.graphs for node in gm.graph.nodes]
    ours = {name for name in nodes if name.startswith("ditopt.")}
    assert ours == {"ditopt.block_sparse_attention.default"}


@pytest.mark.slow
def test_a_wrong_scale_is_no_rounding(
    workload: Workload, rounded: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The distance that 8-bit noise may explain is not as wide as a fault."""

    class Wrong:
        """An engine whose 8-bit scales are a fifth too large."""

        @staticmethod
        def load(folder: Path, verify_borders: bool) -> Any:
            engine = in_memory(workload, rounded)
            for name, value in engine._tensors.items():
                if name.startswith("derived") and value.shape[0] == 1 and value.is_floating_point():
                    value.mul_(1.2)
            return engine

    door = exported(workload)
    monkeypatch.setattr(compare, "Engine", Wrong)
    with pytest.raises(VerificationError, match=r"the engine is wrong at call 3: .*rounding"):
        compare.compare_engine(tmp_path, workload, "model", rounded, door)


@pytest.mark.parametrize(
    ("kind", "blocks", "threshold"),
    [
        ("first_block", 2, 1e-9),
        pytest.param("prediction", 1, 1e9, marks=pytest.mark.slow),
        pytest.param("input", None, 1e9, marks=pytest.mark.slow),
    ],
)
def test_gates_decide_as_in_the_compiled_model(
    workload: Workload, model: nn.Module, kind: str, blocks: int | None, threshold: float
) -> None:
    gate = Gate(kind=kind, threshold=threshold, blocks=blocks)
    cache = CACHE.model_copy(update={"gate": gate})
    plan = plan_for(model, arguments(model), cache=cache, attention=SPARSE)
    engine = in_memory(workload, plan)
    before = ditopt.stats(engine)
    assert against_oracle(engine, workload, plan) < 1e-6
    after = ditopt.stats(engine)
    assert after["gated_steps"] - before["gated_steps"] == 3
    skipped = after["skipped_steps"] - before["skipped_steps"]
    assert skipped == (3 if threshold > 1 else 0)
    schedule = engine.manifest.schedule
    assert schedule is not None
    assert schedule.gated
    assert (engine.manifest.wiring.probe is None) == (kind == "input")
    assert Manifest.from_text(text_of(engine)).wiring == engine.manifest.wiring


@pytest.fixture(scope="module")
def gated(workload: Workload, model: nn.Module) -> Wired:
    cache = CACHE.model_copy(update={"gate": Gate(kind="first_block", threshold=0.1)})
    plan = plan_for(model, arguments(model), cache=cache)
    return link(exported(workload), model, plan, False).wired


def test_composed_sections_keep_the_probe_apart(gated: Wired) -> None:
    wired = compose_sections(gated)
    assert wired.wiring.probe is not None
    assert wired.wiring.probe.cuts == (1,)
    (body,) = wired.wiring.bodies
    assert len(body) == 2
    streams = {slot for slot, _ in wired.wiring.probe.streams}
    assert streams <= set(body[0].outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": [9, 1]}, r"^wiring.probe.cuts\[0\]: the body has \d+ steps"),
        ({"cuts": [1]}, r"^wiring.probe.cuts: expected 2, one per phase"),
        ({"streams": [[999, None]]}, r"^wiring.probe.streams\[0\]: nothing fills slot 999"),
        ({"streams": [[0, 999]]}, r"^wiring.probe.streams\[0\]: nothing fills slot 999"),
        ({"streams": [[0, 1]]}, r"^wiring.probe.streams\[0\]: slot 1 has another shape"),
    ],
)
def test_an_edited_probe_is_refused_by_its_name(
    planned: Any, change: dict[str, Any], message: str
) -> None:
    document = json.loads(text_of(planned))
    assert len(document["wiring"]["bodies"]) == 2
    probe = {"cuts": [1, 1], "streams": [[document["wiring"]["bodies"][0][0]["outputs"][0], None]]}
    document["wiring"]["probe"] = probe
    Manifest.from_text(json.dumps(document))
    document["wiring"]["probe"] = probe | change
    with pytest.raises(EngineError, match=message):
        Manifest.from_text(json.dumps(document))


C = 16


class Block(nn.Module):
    """Attention with a RoPE table; nothing else mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, hidden: Tensor, rope: Tensor, mark: Tensor) -> Tensor:
        q, k, v = (
            layer(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = scaled_dot_product_attention(q * rope, k * rope, v)
        return hidden + self.out(out.transpose(1, 2).flatten(-2)) + mark


class Video(nn.Module):
    """2 x 4 x 4 tokens; a table and an input run beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv3d(3, C, (1, 2, 2), stride=(1, 2, 2)), nn.Linear(C, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("rope", torch.randn(1, 1, 32, C // 2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, marks: Tensor) -> Tensor:
        hidden = self.embed(hidden_states).flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, self.rope, marks)
        return self.head(hidden) + marks[..., :4]


def ordered_plan(model: nn.Module, given: Any, cached: bool) -> Plan:
    window = [{"kind": "window", "frames": 1, "rows": 1, "cols": 1}] * 2
    calls = ((0, 2), {}), ((2, 6), {f"blocks.{k}#0": window for k in range(2)})
    plan = plan_for(model, given, attention=calls, cache=CACHE if cached else None, block=8)
    order = {"kind": "tile", "frames": 2, "rows": 2, "cols": 2}
    return Plan.model_validate({**plan.model_dump(), "order": order})


@pytest.mark.parametrize("cached", [False, True])
def test_tokens_are_put_in_order_by_programs(cached: bool) -> None:
    """What enters the blocks in order is a value, a stored table and an input of the caller."""
    torch.manual_seed(0)
    model = Video().eval().requires_grad_(False)
    given = {
        "hidden_states": torch.randn(1, 3, 2, 8, 8),
        "timestep": torch.full((1,), 900.0),
        "marks": torch.randn(1, 32, C),
    }

    def loop(stand_in: Any, seed: int) -> Tensor:
        now, results = dict(given), []
        for t in (900.0, 750.0, 600.0, 450.0, 300.0, 150.0):
            now["timestep"] = torch.full((1,), t)
            results.append(stand_in(**now))
            now["hidden_states"] = now["hidden_states"] * 0.9
        return torch.stack(results)

    workload = Workload(model, loop)
    plan = ordered_plan(model, given, cached)
    engine = in_memory(workload, plan)
    assert against_oracle(engine, workload, plan) < 1e-6
    (record_of_model,) = compiled_graphs(model)[-1:]
    told = [d.reason for d in record_of_model.decisions if d.rule == "reorder_tokens"]
    assert told[0].startswith("tokens in tile order once around blocks.0 to blocks.1")
    assert any(name.startswith("order.") for name in engine.manifest.tensors)
    assert Manifest.from_text(text_of(engine)).wiring == engine.manifest.wiring


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"^--dynamic: the plan's block lists at blocks.1#0 are made for one size"),
        ({"dense": True}, r"^--dynamic: a plan with a cache cuts the model"),
        ({"dense": True, "cache": None}, r"^--dynamic: a plan with several phases cuts"),
        ({"format": "tensorrt"}, r"^--dynamic: a TensorRT engine is built for one size"),
    ],
)
def test_plans_that_want_one_size_say_why(
    model: nn.Module, change: dict[str, Any], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from ditopt.backends.tensorrt import TensorRTExporter

    monkeypatch.setattr(TensorRTExporter, "available", lambda self: None)
    given = arguments(model)
    attention = [(calls, {}) for calls, _ in SPARSE] if change.get("dense") else SPARSE
    plan = None
    if "format" not in change:
        plan = plan_for(model, given, attention=attention, cache=change.get("cache", CACHE))
    workload = workload_of(model, given, sample)
    with pytest.raises(EngineError, match=message):
        export(
            workload, tmp_path / "engine", plan, dynamic=("batch",),
            format=change.get("format", "pt2"),
        )  # fmt: skip
    assert not (tmp_path / "engine").exists()
