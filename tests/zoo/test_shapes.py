"""Models of unusual shape: lossless without a plan, every attention found, steps cached."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from ditopt.torch_backend import compiled_graphs

from .shapes import SHAPES, arguments, build_shape

NAMES = pytest.mark.parametrize("name", list(SHAPES))


def flat(result):
    return pytree.tree_leaves(result)


@NAMES
def test_matches_eager_at_other_timesteps_and_batches(name):
    torch._dynamo.reset()
    model = build_shape(name)
    compiled = torch.compile(model, backend="ditopt_eager", options={"strict": True})
    for call in ({}, {"t": 250.0, "seed": 1}, {"batch": 2}, {"batch": 3, "seed": 2}):
        inputs = arguments(name, **call)
        for got, expected in zip(flat(compiled(**inputs)), flat(model(**inputs)), strict=True):
            error = (got - expected).norm() / expected.norm()
            assert error <= 1e-6, call
    assert len(compiled_graphs(model)[0].attention) == SHAPES[name].attentions


def test_an_input_that_is_left_out_at_first_makes_one_more_graph_as_without_ditopt():
    counted = {}
    for backend in ("eager", "ditopt_eager"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(build_shape("self_conditioned"), backend=backend)
        inputs = arguments("self_conditioned")
        previous = compiled(inputs["hidden_states"], inputs["timestep"])
        for _ in range(2):
            previous = compiled(inputs["hidden_states"], inputs["timestep"], previous)
        counted[backend] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted["ditopt_eager"] == counted["eager"] == 2


@pytest.mark.parametrize("name", ["odd_heads", "hybrid"])
def test_inductor(name):
    torch._dynamo.reset()
    model, inputs = build_shape(name), arguments(name)
    compiled = torch.compile(model, backend="ditopt", options={"strict": True})
    for got, expected in zip(flat(compiled(**inputs)), flat(model(**inputs)), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
