from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditopt
from ditopt import fingerprint
from ditopt.caching import CacheSchedule
from ditopt.errors import PlanError
from ditopt.metrics import psnr
from ditopt.plan import Hardware, ModelRecord, Phase, Plan, Sampler, SiteRecord
from ditopt.profiling.schema import Profile
from ditopt.search import verify
from ditopt.search.exchange import ExchangeableModel, cache_section
from ditopt.workload import Workload

CALLS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


class Blocks(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states) + timestep
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()  # it compiles one function a few times only


def schedule(*full: int) -> CacheSchedule:
    skipped = [call for call in range(CALLS) if call not in full]
    rows = {c: (1.5, -0.5) if sum(f < c for f in full) > 1 else (1.0,) for c in skipped}
    return CacheSchedule(CALLS, full, rows)


def plan_for(model: nn.Module, cache: CacheSchedule) -> Plan:
    record = ModelRecord(
        architecture=fingerprint.architecture(model),
        weights=fingerprint.weights(model),
        name="Blocks",
        sites=tuple(
            SiteRecord(id=f"{name}#0", kind="self", heads=1, head_dim=8)
            for name, module in model.named_modules()
            if isinstance(module, Block)
        ),
    )
    return Plan(
        model=record,
        sampler=Sampler(
            calls=CALLS,
            timestep="timestep",
            timesteps=tuple(float(6 - c) for c in range(CALLS)),
            varying=("hidden_states", "timestep"),
        ),
        hardware=Hardware(device="cpu", name="-", torch=torch.__version__, threads=1),
        phases=(Phase(calls=(0, CALLS)),),
        cache=cache_section(cache),
    )


def sample(model: Any, batch: int = 1) -> Tensor:
    x = torch.linspace(-1, 1, 12 * batch).reshape(batch, 3, 4)
    with torch.no_grad(), ditopt.session(calls=CALLS):
        for call in range(CALLS):
            x = x - 0.1 * model(hidden_states=x, timestep=torch.tensor([float(6 - call)]))
    return x


def test_each_schedule_gives_what_its_own_plan_gives() -> None:
    model = Blocks().eval().requires_grad_(False)
    exchangeable = ExchangeableModel(model, plan_for(model, schedule(0, 2, 4)), "eager")
    dense = sample(model)
    for full in ((0, 3), (0, 1, 2, 3, 4, 5), (0, 1, 4)):
        chosen = schedule(*full)
        exchangeable.use(chosen)
        found = sample(exchangeable.model)
        assert exchangeable.counted == (len(full), CALLS - len(full))
        assert torch.equal(found, dense) == (len(full) == CALLS)
    exchangeable.use(None)
    assert torch.equal(sample(exchangeable.model), dense)
    torch.compiler.reset()
    options = {"plan": plan_for(model, chosen)}
    planned = torch.compile(model, backend="ditopt_eager", options=options)
    assert torch.equal(found, sample(planned))


def test_other_shapes_have_programs_of_their_own() -> None:
    model = Blocks().eval().requires_grad_(False)
    exchangeable = ExchangeableModel(model, plan_for(model, schedule(0, 2, 4)), "eager")
    exchangeable.use(schedule(0, 1, 4))
    first = sample(exchangeable.model)
    sample(exchangeable.model, batch=5)  # compiles in the middle of a run, which then stays full
    wide = sample(exchangeable.model, batch=5)
    assert len(exchangeable.runtimes) > 1
    exchangeable.use(schedule(0, 3))
    other = sample(exchangeable.model)
    exchangeable.use(schedule(0, 1, 4))
    assert torch.equal(sample(exchangeable.model), first)
    torch.testing.assert_close(sample(exchangeable.model, batch=5), wide)
    assert not torch.equal(other, first)


def test_a_plan_without_a_cache_is_refused() -> None:
    model = Blocks()
    dense = CacheSchedule(CALLS, tuple(range(CALLS)), {})
    assert cache_section(dense) is None
    with pytest.raises(PlanError, match="expected a plan with a cache schedule"):
        ExchangeableModel(model, plan_for(model, dense))


def test_a_model_without_a_block_stack_is_refused() -> None:
    model = Blocks(blocks=0).eval().requires_grad_(False)
    exchangeable = ExchangeableModel(model, plan_for(model, schedule(0, 2, 4)), "eager")
    with pytest.raises(Exception, match="no block stack was found"):
        sample(exchangeable.model)


def test_the_verifier_samples_schedules_with_one_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Blocks().eval().requires_grad_(False)
    plan = plan_for(model, schedule(0, 2, 4))
    made: list[ExchangeableModel] = []

    def make(model: nn.Module, plan: Plan) -> ExchangeableModel:
        made.append(ExchangeableModel(model, plan, "eager"))
        return made[-1]

    monkeypatch.setattr(verify, "ExchangeableModel", make)
    workload = Workload(model, lambda denoiser, seed: sample(denoiser) + seed, data_range=2.0)
    profile = Profile(
        model=plan.model,
        sampler=plan.sampler,
        hardware=plan.hardware,
        layout=None,
        block=plan.block,
        options=(),
        shapes={},
        observed_calls=(0,),
        data_range=2.0,
        seeds=(0,),
        finished=(0,),
    )
    verifier = verify.SamplingVerifier(workload, profile, tmp_path)
    dense = sample(model)
    found = [verifier.schedule_psnr_db(schedule(*full), 0) for full in ((0, 3), (0, 1, 2, 4, 5))]
    (exchangeable,) = made
    for full, psnr_db in zip(((0, 3), (0, 1, 2, 4, 5)), found, strict=True):
        exchangeable.use(schedule(*full))
        expected = psnr(sample(exchangeable.model), dense, 2.0)
        assert exchangeable.counted == (len(full), CALLS - len(full))
        assert psnr_db == pytest.approx(expected, abs=1e-6)
    assert found[0] < found[1] < verify.EXACT_DB
