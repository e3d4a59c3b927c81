from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ditopt.config import Options
from ditopt.graph import fake_value, output_nodes
from ditopt.passes.base import FusedWeight
from ditopt.passes.fuse_projections import FuseProjections

LINEAR = torch.ops.aten.linear.default
SPLIT = torch.ops.aten.split_with_sizes.default
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Projections(nn.Module):
    """q, k, v of unequal widths from one tensor, and a layer that reads another."""

    def __init__(self, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8, bias=biases[0])
        self.k = nn.Linear(8, 8, bias=biases[1])
        self.v = nn.Linear(8, 16, bias=biases[2])
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.v(x)) + self.q(x) * self.k(x).view(-1).view(x.shape)


class Custom(nn.Module):
    """Two layers of one tensor, made by `call(x, w, v, b)` from three parameters."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.v, self.b)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_tensor_become_one_product(harness: Any, bias: bool) -> None:
    graph = harness(Projections((bias, bias, bias)), X)
    decisions = graph.run(FuseProjections())
    assert [(d.applied, d.reason) for d in decisions] == [
        (True, "3 projections of one tensor in one matrix product")
    ] * 3
    fused, out = graph.nodes(LINEAR)
    assert fake_value(fused).shape == (2, 5, 32)
    assert fake_value(out).shape == (2, 5, 8)
    assert len(graph.nodes(SPLIT)) == 1
    further = [n for n in graph.gm.graph.nodes if isinstance(n.meta.get("ditopt"), FusedWeight)]
    assert len(further) == 1 + bias


def test_numbers_stay(harness: Any) -> None:
    graph = harness(Projections(), X)
    graph.run(FuseProjections())
    graph.assert_lossless(graph.result())


def test_a_second_run_finds_nothing(harness: Any) -> None:
    graph = harness(Projections(), X)
    graph.run(FuseProjections())
    code = graph.gm.code
    assert graph.run(FuseProjections()) == []
    assert graph.gm.code == code


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Custom(lambda x, w, v, b: linear(x, w) + linear(x, v).transpose(0, 1).sum()), X)
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(FuseProjections())
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


def test_parts_that_leave_the_graph_are_laid_out_as_before(harness: Any) -> None:
    graph = harness(Custom(lambda x, w, v, b: (linear(x, w), linear(x, v))), X)
    graph.run(FuseProjections())
    assert [out.is_contiguous() for out in graph.result()] == [True, True]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda x, w, v, b: linear(x, w) + linear(x, v * 2),
            "a weight is computed, not a parameter",
        ),
        (lambda x, w, v, b: linear(x, w) + linear(x, w, b), "two projections share a weight"),
        (
            lambda x, w, v, b: linear(x, w, b) + linear(x, v),
            "some projections have a bias and some have none",
        ),
        (
            lambda x, w, v, b: linear(x, w, b) + linear(x, v, b + 1),
            "a bias is computed, not a parameter",
        ),
    ],
    ids=["computed weight", "shared weight", "one bias", "computed bias"],
)
def test_declined(harness: Any, call: Any, reason: str) -> None:
    graph = harness(Custom(call), X)
    code = graph.gm.code
    decisions = graph.run(FuseProjections())
    assert [(d.applied, d.reason) for d in decisions] == [(False, reason)] * 2
    assert graph.gm.code == code


def test_declined_when_a_weight_is_an_input_of_the_call(harness: Any) -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor, v: Tensor) -> Tensor:
            return linear(x, self.w) + linear(x, v)

    decisions = harness(Hyper(), X, torch.randn(8, 8)).run(FuseProjections())
    assert {d.reason for d in decisions} == {"a weight is computed, not a parameter"}


def test_declined_for_several_dtypes(harness: Any) -> None:
    graph = harness(Custom(lambda x, w, v, b: linear(x, w) + linear(x, v)), X)
    weight = graph.nodes(LINEAR)[0].args[1]
    weight.meta["val"] = weight.meta["val"].half()
    decisions = graph.run(FuseProjections())
    assert {(d.applied, d.reason) for d in decisions} == {
        (False, "the weights have several dtypes")
    }


def test_declined_when_switched_off(harness: Any) -> None:
    graph = harness(Projections(), X)
    decisions = graph.run(FuseProjections(), options=Options(fuse_projections=False))
    assert {d.reason for d in decisions} == {"switched off by the option fuse_projections"}
    assert len(graph.nodes(LINEAR)) == 4


def test_a_single_layer_is_not_worth_a_word(harness: Any) -> None:
    assert harness(nn.Linear(8, 8), X).run(FuseProjections()) == []
