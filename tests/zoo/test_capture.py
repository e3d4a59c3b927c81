"""Every architecture through `ditopt_eager`: numbers, graphs and recompilations are eager's."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from ditopt.backends.eager import EagerBackend
from ditopt.config import Options
from ditopt.inspection import InspectReport
from ditopt.part_maker import Phase
from ditopt.program import ProgramBuilder
from ditopt.runtime import InputRoles, StepRuntime

from .compiled import full_sequence, go
from .models import ZOO
from .runs import BROKEN, Graph, calls, counts, relative_l2, run


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
def test_what_graph_breaks_cost_is_said(name):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(InspectReport({name: [g.compiled for g in run(name).static]}).table())
    text = " ".join(shown.get().split())
    assert f"{len(run(name).static)} graphs: the model breaks while it is captured" in text
    assert "step caching" in text


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_each_resolution_then_batch_two(name):
    outcome = go(name, full_sequence(name), backend="ditopt_eager")
    assert outcome.graphs == outcome.graphs_eager
    assert max(outcome.relative_l2) <= 1e-5


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_bit_equal_without_fusion(name):
    options = {"fuse_projections": False}
    outcome = go(name, full_sequence(name), backend="ditopt_eager", options=options)
    assert outcome.graphs == outcome.graphs_eager
    assert outcome.relative_l2 == [0.0] * len(outcome.calls)
