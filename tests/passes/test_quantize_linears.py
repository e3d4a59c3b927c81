from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ditopt.config import Options
from ditopt.graph import fake_value, output_nodes, placeholders
from ditopt.passes.base import FusedWeight, LinearOperand
from ditopt.passes.fuse_projections import FuseProjections
from ditopt.passes.quantize_linears import QuantizeLinears
from ditopt.quantization import LinearRule
from ditopt.quantization.layer import derive

aten = torch.ops.aten
LINEAR = aten.linear.default
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
INT8, FP8 = LinearRule(format="int8_row"), LinearRule(format="fp8_row", simulate=True)
STATISTICS = {"mean": X.mean((0, 1)), "amax": X.abs().amax((0, 1))}


class Layers(nn.Module):
    """Three projections of one tensor, and a layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 32)
        self.out = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.v(x)) + self.q(x) * self.k(x)


class Custom(nn.Module):
    """Layers of `call(x, w, v, b)` from three parameters."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call
        self.w, self.v = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))
        self.b = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.v, self.b)


def everywhere(graph: Any, rule: LinearRule | str) -> dict[str, LinearRule | str]:
    return {node.name: rule for node in graph.nodes(LINEAR)}


def result(graph: Any, statistics: Mapping[str, Tensor] = STATISTICS) -> Tensor:
    """What the rewritten graph returns, with operands made as the runtime makes them."""
    further = []
    for node in placeholders(graph.gm)[len(graph.arguments) :]:
        spec = node.meta["ditopt"]
        if isinstance(spec, FusedWeight):
            further.append(torch.cat([graph.arguments[k] for k in spec.positions]))
            continue
        weights, biases = (
            [graph.arguments[k] for k in part] for part in (spec.weights, spec.biases)
        )
        made = derive(spec.rule, weights, biases, statistics)[spec.name]
        fake = fake_value(node)
        assert (made.shape, made.dtype) == (fake.shape, fake.dtype)
        further.append(made)
    with torch.no_grad():
        (out,) = graph.gm(*graph.arguments, *further)
    return out


def error(out: Tensor, module: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        exact = module.double()(x.double())
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rule", "bound"), [(INT8, 0.02), (FP8, 0.08)])
def test_layers_are_rewritten_one_by_one(harness: Any, rule: LinearRule, bound: float) -> None:
    graph = harness(Layers(), X)
    decisions = graph.run(QuantizeLinears(), linear=everywhere(graph, rule))
    assert [d.applied for d in decisions] == [True] * 4
    assert not graph.nodes(LINEAR)
    assert len(graph.nodes(aten._int_mm.default)) == (4 if rule is INT8 else 0)
    found = error(result(graph), graph.module)
    assert 1e-4 < found < bound


def test_merged_projections_stay_merged(harness: Any) -> None:
    graph = harness(Layers(), X)
    linear_nodes = everywhere(graph, INT8)
    decisions = graph.run(FuseProjections(), QuantizeLinears(), linear=linear_nodes)
    texts = [d.reason for d in decisions if "int8" in d.reason]
    assert texts == ["int8_row by _int_mm, 3 layers in one"] * 3 + ["int8_row by _int_mm"]
    first, _ = graph.nodes(aten._int_mm.default)
    assert fake_value(first).shape == (10, 64)
    specs = [n.meta.get("ditopt") for n in placeholders(graph.gm)]
    assert sum(isinstance(s, LinearOperand) and len(s.weights) == 3 for s in specs) == 2
    # The merged weight is gone, the merged bias is still added.
    assert sum(isinstance(s, FusedWeight) for s in specs) == 1
    assert error(result(graph), graph.module) < 0.02


def test_merged_and_single_layers_give_the_same_numbers(harness: Any) -> None:
    module = Layers()
    single, merged = harness(module, X), harness(module, X)
    single.run(QuantizeLinears(), linear=everywhere(single, INT8))
    merged.run(FuseProjections(), QuantizeLinears(), linear=everywhere(merged, INT8))
    assert torch.equal(result(single), result(merged))


def test_layers_with_different_rules_are_not_merged(harness: Any) -> None:
    graph = harness(Layers(), X)
    rules = everywhere(graph, INT8)
    rules[graph.nodes(LINEAR)[0].name] = FP8
    graph.run(FuseProjections(), QuantizeLinears(), linear=rules)
    assert [fake_value(n).shape[1] for n in graph.nodes(aten._int_mm.default)] == [16, 32]


def test_without_a_plan_nothing_happens(harness: Any) -> None:
    graph = harness(Layers(), X)
    code = graph.gm.code
    assert graph.run(QuantizeLinears()) == []
    assert graph.gm.code == code


@pytest.mark.parametrize("format_name", ["int8_row", "none"])
def test_a_second_run_finds_nothing(harness: Any, format_name: str) -> None:
    graph = harness(Layers(), X)
    rule = LinearRule.model_validate({"format": format_name, "transform": "centre"})
    rules = everywhere(graph, rule)
    graph.run(QuantizeLinears(), linear=rules)
    code = graph.gm.code
    assert graph.run(QuantizeLinears(), linear=rules) == []
    assert graph.gm.code == code


def test_outputs_keep_shape_dtype_and_strides(harness: Any) -> None:
    graph = harness(Layers(), X)
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(QuantizeLinears(), linear=everywhere(graph, INT8))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    same = (after.shape, after.stride(), after.dtype)
    assert same == (before.shape, before.stride(), before.dtype)


def test_sizes_that_are_known_at_run_time_only(harness: Any) -> None:
    module = Layers()
    graph = harness(module, X)
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    graph = harness(module, x)
    graph.run(QuantizeLinears(), linear=everywhere(graph, INT8))
    position = next(k for k, a in enumerate(graph.arguments) if a is x)
    longer = torch.randn(3, 7, 16)
    graph.arguments[position] = longer
    for k, a in enumerate(graph.arguments):
        if isinstance(a, torch.SymInt):
            graph.arguments[k] = {2: 3, 5: 7}[int(a)]
    assert error(result(graph), module, longer) < 0.02


@pytest.mark.parametrize("transform", ["centre", "balance", "rotate"])
def test_a_transform_alone_is_exact_in_float64(harness: Any, transform: str) -> None:
    module = Layers().double()
    graph = harness(module, X.double())
    rule = LinearRule.model_validate({"format": "none", "transform": transform})
    _, out, *_ = graph.nodes(LINEAR)
    rules = everywhere(graph, rule)
    del rules[out.name]  # it reads other channels than the statistics are about
    graph.run(FuseProjections(), QuantizeLinears(), linear=rules)
    assert len(graph.nodes(LINEAR)) == 2
    assert error(result(graph), module) <= 1e-12


DECLINED = [
    (lambda x, w, v, b: linear(x, w * 2), INT8, "its weight is computed, not a parameter"),
    (
        lambda x, w, v, b: linear(x, w, b + 1),
        LinearRule(format="int8_row", transform="centre"),
        "its bias is computed, not a parameter",
    ),
    (
        lambda x, w, v, b: linear(x, w) + w[0],
        INT8,
        "the weight is tied: another operator reads it too",
    ),
    (
        lambda x, w, v, b: linear(x, w),
        LinearRule(format="fp8_row"),
        "the CPU has no fp8 matrix product, and the plan does not say simulate",
    ),
    (lambda x, w, v, b: linear(x, w), "a reason of the plan's", "a reason of the plan's"),
]


@pytest.mark.parametrize(
    ("call", "rule", "reason"), DECLINED, ids=["weight", "bias", "tied", "hardware", "plan"]
)
def test_declined(harness: Any, call: Any, rule: LinearRule | str, reason: str) -> None:
    graph = harness(Custom(call), X)
    code = graph.gm.code
    decisions = graph.run(QuantizeLinears(), linear=everywhere(graph, rule))
    assert [(d.applied, d.reason) for d in decisions] == [(False, reason)]
    assert graph.gm.code == code


def test_declined_where_the_rotation_does_not_fit(harness: Any) -> None:
    graph = harness(nn.Linear(6, 8), torch.randn(3, 6))
    rule = LinearRule(format="int8_row", transform="rotate")
    (decision,) = graph.run(QuantizeLinears(), linear=everywhere(graph, rule))
    assert decision.reason == "K = 6 is no multiple of 4, as the rotation needs"


def test_declined_for_mixed_dtypes(harness: Any) -> None:
    graph = harness(nn.Linear(16, 16), X)
    weight = graph.nodes(LINEAR)[0].args[1]
    weight.meta["val"] = weight.meta["val"].half()
    (decision,) = graph.run(QuantizeLinears(), linear=everywhere(graph, INT8))
    assert "weight and input have different dtypes" in decision.reason


def test_can_be_disabled(harness: Any) -> None:
    graph = harness(Layers(), X)
    options = Options(disable=("quantize_linears",))
    decisions = graph.run(options=options, linear=everywhere(graph, INT8))
    assert not any("int8" in d.reason for d in decisions)


class Merged(nn.Module):
    """A layer of one tensor beside an activated other, as in a single-stream block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(48, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        gelu = nn.functional.gelu(self.up(x), approximate="tanh")
        gelu = nn.functional.dropout(gelu, 0.1, training=False)  # as feed-forwards have it
        return self.out(nn.functional.silu(self.down(torch.cat([x, gelu], dim=2))))


@pytest.mark.parametrize("rule", [INT8, FP8])
def test_the_rounding_kernel_takes_in_what_comes_before(harness: Any, rule: LinearRule) -> None:
    module = Merged()
    plain, fused = harness(module, X), harness(module, X)
    plain.run(QuantizeLinears(), linear=everywhere(plain, rule))
    options = Options(rounding_kernel=True)
    decisions = fused.run(QuantizeLinears(), linear=everywhere(fused, rule), options=options)
    by_kernel = [d.reason.endswith("rounded by quantize_rows") for d in decisions]
    assert by_kernel == [False, True, True]  # nothing stands before the first layer
    calls = fused.nodes(torch.ops.ditopt.quantize_rows.default)
    assert [call.args[1] for call in calls] == [["none", "gelu_tanh"], ["silu"]]
    for gone in (aten.gelu.default, aten.silu.default, aten.cat.default):
        assert not fused.nodes(gone)
    torch.testing.assert_close(result(fused), result(plain), atol=1e-5, rtol=1e-5)


def test_an_activation_that_others_read_stays(harness: Any) -> None:
    def call(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        y = nn.functional.silu(x)
        return linear(y, w) + y

    graph = harness(Custom(call), X)
    options = Options(rounding_kernel=True)
    (decision,) = graph.run(QuantizeLinears(), linear=everywhere(graph, INT8), options=options)
    assert decision.reason == "int8_row by _int_mm"
    assert graph.nodes(aten.silu.default)
