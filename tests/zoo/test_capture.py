"""Every architecture through `ditopt_eager`: the same numbers, graphs and recompilations as eager."""

from __future__ import annotations

import pytest
import torch

from ditopt.backends.eager import EagerBackend
from ditopt.config import Options
from ditopt.program import Phase, ProgramBuilder
from ditopt.runtime import InputRoles, StepRuntime

from .models import ZOO, build, first_tensor, kwargs_for
from .runs import BROKEN, Graph, calls, counts, relative_l2, resolutions, run


def unfused(graph: Graph) -> StepRuntime:
    """The graph's programs without projection fusion: nothing is rewritten."""
    options = Options(fuse_projections=False)
    sites = graph.compiled.attention
    builder = ProgramBuilder(graph.captured, sites, EagerBackend(), options, torch.device("cpu"))
    return StepRuntime(builder.build([Phase()], None, InputRoles()))


@pytest.mark.parametrize("name", ZOO)
def test_matches_eager(name):
    made = run(name)
    errors = [relative_l2(*pair) for pair in zip(made.results, made.expected, strict=True)]
    assert max(errors) <= 1e-5, dict(zip(map(str, calls(name)), errors, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_graphs_and_recompilations_are_those_of_eager(name):
    made = run(name)
    assert [len(graphs) for graphs in made.graphs] == counts(made.model, calls(name), name)


@pytest.mark.parametrize("name", ZOO)
def test_number_of_graphs(name):
    made = run(name)
    assert (len(made.static) == 1) == (name not in BROKEN)


@pytest.mark.parametrize("name", ZOO)
def test_canonical_graph_is_bit_equal_where_nothing_is_fused(name):
    made = run(name)
    with torch.no_grad():
        for graph in [graph for graphs in made.graphs for graph in graphs]:
            results = unfused(graph)(*graph.arguments)
            expected = graph.gm(*graph.arguments)
            assert len(results) == len(expected)
            for result, wanted in zip(results, expected, strict=True):
                if not isinstance(wanted, torch.Tensor):
                    assert result == wanted
                    continue
                assert (result.dtype, result.stride()) == (wanted.dtype, wanted.stride())
                assert torch.equal(result, wanted)


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_what_a_graph_break_costs_is_said(name):
    made = run(name)
    lost = [d.reason for graph in made.static for d in graph.compiled.decisions if not d.applied]
    assert any("graph" in reason for reason in lost)


LONG = [
    {},
    {"t": 300.0},
    *({"hw": index} for index in (1, 2, 3)),
    {"batch": 2},
    {"batch": 2, "hw": 1},
]


@pytest.mark.zoo
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ZOO)
def test_each_resolution_then_batch_two(name, fuse):
    sequence = [{**call, "hw": resolutions(name)[call.get("hw", 0)]} for call in LONG]
    model, _ = build(name)
    graphs = counts(model, sequence, name)

    torch.compiler.reset()
    from ditopt.torch_backend import compiled_graphs

    compiled = torch.compile(model, backend="ditopt_eager", options={"fuse_projections": fuse})
    seen = []
    with torch.no_grad():
        for call in sequence:
            before = len(compiled_graphs(model))
            expected = first_tensor(model(**kwargs_for(name, **call)))
            result = first_tensor(compiled(**kwargs_for(name, **call)))
            seen.append(len(compiled_graphs(model)) - before)
            if fuse:
                assert relative_l2(result, expected) <= 1e-5, call
            else:
                assert torch.equal(result, expected), call
    assert seen == graphs
