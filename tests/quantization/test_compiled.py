"""Plans that name formats, applied to a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import ditopt
from ditopt.errors import DitoptError, PlanError
from ditopt.quantization.statistics import plan_tensors, watch
from ditopt.report import Decision
from ditopt.torch_backend import compiled_graphs

from .small_model import Model, plan_for

X, T = (torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (33, 1))
INT8 = {"format": "int8_row"}


@pytest.fixture
def model() -> Model:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Model(blocks=1).eval().requires_grad_(False)


def layers(model: nn.Module) -> list[str]:
    linears = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [name for name in linears if "modulation" not in name]


def compiled(model: nn.Module, plan: Any, backend: str = "ditopt_eager", **options: Any) -> Any:
    return torch.compile(model, backend=backend, options={"plan": plan, **options})


def told(model: nn.Module) -> dict[str, Decision]:
    (record,) = compiled_graphs(model)
    return {d.site: d for d in record.decisions if d.rule == "quantize_linears"}


def distance(out: Tensor, truth: Tensor) -> float:
    return float((out - truth).norm() / truth.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    "backend", ["ditopt_eager", pytest.param("ditopt", marks=pytest.mark.slow)]
)
def test_every_named_layer_is_rounded(model: Model, backend: str) -> None:
    names = layers(model)
    out = compiled(model, plan_for(model, dict.fromkeys(names, INT8)), backend)(X, T[:, 0])
    assert 1e-4 < distance(out, model(X, T[:, 0])) < 0.02
    assert set(told(model)) == set(names)
    assert {d.reason for d in told(model).values()} == {
        "int8_row by _int_mm",
        "int8_row by _int_mm, 3 layers in one",
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "backend", ["ditopt_eager", pytest.param("ditopt", marks=pytest.mark.slow)]
)
def test_the_rounding_kernel_gives_the_same(model: Model, backend: str) -> None:
    plan = plan_for(model, dict.fromkeys(layers(model), INT8))
    plain = compiled(model, plan, backend)(X, T[:, 0])
    torch._dynamo.reset()
    run = compiled(model, plan, backend, rounding_kernel=True)
    assert distance(run(X, T[:, 0]), plain) < 1e-5
    last = compiled_graphs(model)[-1]
    down = [d.reason for d in last.decisions if d.site == "blocks.0.down"]
    assert "int8_row by _int_mm, rounded by quantize_rows" in down


@torch.no_grad()
@pytest.mark.parametrize("transform", ["centre", "balance", "rotate", "rotate_twice"])
def test_transforms_alone_are_exact(model: Model, transform: str) -> None:
    model.double()
    x, t = X.double(), T[:, 0].double()
    with watch(model) as seen:
        truth = model(x, t)
    tensors = {name: value.double() for name, value in plan_tensors(seen).items()}
    rule = {"format": "none", "transform": transform}
    plan = plan_for(model, dict.fromkeys(layers(model), rule), statistics=tensors)
    assert distance(compiled(model, plan)(x, t), truth) <= 1e-12
    assert all(d.applied for d in told(model).values())


@torch.no_grad()
@pytest.mark.parametrize("form", ["int4_group", "twin_log", "codebook"])
def test_stored_formats_run(model: Model, form: str) -> None:
    name = "blocks.0.up"
    out = compiled(model, plan_for(model, {name: {"format": form}}))(X, T[:, 0])
    assert told(model)[name].reason == f"{form}, decoded at every call: smaller, not faster"
    assert 1e-4 < distance(out, model(X, T[:, 0])) < 0.3


@torch.no_grad()
def test_phases_differ(model: Model) -> None:
    plan = plan_for(model, {}, dict.fromkeys(layers(model), INT8))
    run = compiled(model, plan)
    truth = model(X, T[:, 0])
    with ditopt.session("run"):
        first, second = (distance(run(X, T[:, 0]), truth) for _ in range(2))
    assert first < 1e-5
    assert second > 1e-4


def in_place(model: Model) -> None:
    model.blocks[0].up.weight.mul_(2)


def load(model: Model) -> None:
    model.load_state_dict(Model(blocks=1).state_dict())


def behind_the_back(model: Model) -> None:
    model.blocks[0].up.weight.data.mul_(2)
    ditopt.invalidate(model)


@torch.no_grad()
@pytest.mark.parametrize("change", [in_place, load, behind_the_back])
def test_rounded_weights_follow_their_originals(
    model: Model, change: Callable[[Model], None]
) -> None:
    run = compiled(model, plan_for(model, dict.fromkeys(layers(model), INT8)))
    run(X, T[:, 0])
    before = model(X, T[:, 0])
    change(model)
    truth = model(X, T[:, 0])
    assert distance(before, truth) > 0.05
    assert distance(run(X, T[:, 0]), truth) < 0.02


@torch.no_grad()
def test_a_weight_that_turns_bad_is_an_error(model: Model) -> None:
    run = compiled(model, plan_for(model, {"blocks.0.up": INT8}))
    run(X, T[:, 0])
    model.blocks[0].up.weight[3, 4] = float("inf")
    with pytest.raises(DitoptError, match="holds NaN or infinity"):
        run(X, T[:, 0])


@torch.no_grad()
def test_originals_are_let_go_where_nothing_else_reads_them(model: Model) -> None:
    truth = model(X, T[:, 0])
    plan = plan_for(model, dict.fromkeys(layers(model), INT8))
    run = compiled(model, plan, release_weights=True)
    outs = [run(X, T[:, 0]) for _ in range(2)]
    assert all(distance(out, truth) < 0.02 for out in outs)
    assert all(
        model.get_parameter(f"{n}.weight").untyped_storage().size() == 0 for n in layers(model)
    )
    (record,) = compiled_graphs(model)
    assert record.derived is not None
    held = sum(t.nbytes for t in record.derived.tensors if "scale" in t.names)
    original = sum(model.get_parameter(f"{n}.weight").nbytes for n in layers(model))
    assert original / held > 3.7  # from float32; the scales are the rest


@torch.no_grad()
def test_originals_that_another_phase_reads_are_kept(model: Model) -> None:
    truth = model(X, T[:, 0])
    plan = plan_for(model, {}, dict.fromkeys(layers(model), INT8))
    run = compiled(model, plan, release_weights=True)
    with ditopt.session("run"):
        outs = [run(X, T[:, 0]) for _ in range(2)]
    assert all(distance(out, truth) < 0.02 for out in outs)
    assert model.blocks[0].up.weight.untyped_storage().size() > 0
    assert model.blocks[0].to_q.weight.untyped_storage().size() > 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.blocks[1].weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](torch.relu(self.blocks[0](x)))


@torch.no_grad()
def test_reasons_against() -> None:
    torch._dynamo.reset()
    tied = Tied().eval()
    compiled(tied, plan_for(tied, {"blocks.0": INT8}))(X[0, :, :16])
    assert told(tied)["blocks.0"].reason == "the weight is tied: another operator reads it too"

    model = Model(blocks=1).eval()
    model.blocks[0].up.weight[0, 0] = float("nan")
    rules = {
        "blocks.0.up": INT8,
        "blocks.0.down": {"format": "int8_row", "transform": "balance"},
        "blocks.0.to_out": {"format": "fp8_row"},
    }
    statistics = {"linear/amax/blocks.0.down": torch.ones(3)}
    compiled(model, plan_for(model, rules, statistics=statistics))(X, T[:, 0])
    assert {site: d.reason for site, d in told(model).items()} == {
        "blocks.0.up": "the weight holds NaN or infinity",
        "blocks.0.down": "the plan's statistic 'amax' has shape (3,), the layer has K = 128",
        "blocks.0.to_out": "the CPU has no fp8 matrix product, and the plan does not say simulate",
    }


@torch.no_grad()
def test_statistics_that_the_plan_lacks(model: Model) -> None:
    rule = {"format": "int8_row", "transform": "centre"}
    compiled(model, plan_for(model, {"blocks.0.up": rule}))(X, T[:, 0])
    wanted = "transform 'centre' needs the statistic 'mean', not in the plan"
    assert told(model)["blocks.0.up"].reason == wanted


def test_training_is_refused(model: Model) -> None:
    model.requires_grad_(True)
    plan = plan_for(model, {"blocks.0.up": INT8})
    with pytest.raises(BackendCompilerFailed, match="training: gradients are enabled") as error:
        compiled(model, plan)(X, T[:, 0])
    assert isinstance(error.value.inner_exception, PlanError)


@torch.no_grad()
def test_without_a_plan_nothing_is_rounded(model: Model) -> None:
    out = torch.compile(model, backend="ditopt_eager")(X, T[:, 0])
    assert distance(out, model(X, T[:, 0])) < 1e-6
    assert told(model) == {}
