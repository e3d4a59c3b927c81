from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from ditopt.errors import CaptureError
from ditopt.graph import (
    clean_module_path,
    erase_unused,
    external_inputs,
    external_outputs,
    graph_key,
    producers,
    subgraph,
    verify,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['3']", "blocks.3"),
        ("L['self']", ""),
        ("blocks.0", "blocks.0"),
    ],
)
def test_clean_module_path(raw: str, clean: str) -> None:
    assert clean_module_path(raw) == clean


def chain(table: torch.Tensor) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """((x + 1) * table).relu()."""
    root = nn.Module()
    root.register_buffer("table", table)
    graph = fx.Graph()
    x = graph.placeholder("x")
    held = graph.get_attr("table")
    added = graph.call_function(torch.add, (x, 1))
    scaled = graph.call_function(torch.mul, (added, held))
    out = graph.call_function(torch.relu, (scaled,))
    graph.output((out,))
    nodes = {"x": x, "held": held, "added": added, "scaled": scaled, "out": out}
    return fx.GraphModule(root, graph), nodes


def test_boundaries_of_a_stretch() -> None:
    _, n = chain(torch.ones(1))
    assert external_inputs([n["added"], n["scaled"]]) == [n["x"], n["held"]]
    assert external_outputs([n["added"], n["scaled"]]) == [n["scaled"]]


def test_subgraph_runs_by_itself() -> None:
    gm, n = chain(torch.tensor([3.0]))
    part = subgraph(gm, [n["held"], n["scaled"]], [n["added"]], [n["scaled"]])
    assert part(torch.tensor([2.0]))[0].item() == 6.0


def test_keys_see_the_values_of_constants() -> None:
    keys = [graph_key(chain(torch.tensor([value]))[0]) for value in (1.0, 1.0, 2.0)]
    assert keys[0] == keys[1] != keys[2]


def test_keys_see_dtypes_of_constants() -> None:
    one, other = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    assert graph_key(chain(one)[0]) != graph_key(chain(other)[0])


def test_producers_stop_at_the_nearest() -> None:
    _, n = chain(torch.ones(1))
    assert producers(n["out"], lambda node: node.op == "placeholder") == [n["x"]]
    assert producers(n["out"], lambda node: node is n["scaled"]) == [n["scaled"]]


def test_verify_names_nodes_without_a_value() -> None:
    gm, _ = chain(torch.ones(1))
    with pytest.raises(CaptureError, match="here: nodes without a recorded value: add"):
        verify(gm, "here")


def test_erase_unused_goes_backwards() -> None:
    gm, n = chain(torch.ones(1))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = ((n["x"],),)
    erase_unused(gm.graph, [n["added"], n["scaled"], n["out"]])
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "get_attr", "output"]
