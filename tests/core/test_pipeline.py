"""The runner of the passes, on passes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from ditopt.capture import capture
from ditopt.config import Options
from ditopt.errors import CaptureError, ConfigError
from ditopt.graph import fake_value, output_nodes
from ditopt.passes.base import NodeDecision, PassContext
from ditopt.pipeline import BACKENDS, PIPELINE, PassRunner, check_order

aten = torch.ops.aten


class Step:
    """A pass that does `rewrite` and says `decisions`."""

    def __init__(
        self,
        name: str,
        rewrite: Callable[[fx.GraphModule], None] = lambda gm: None,
        decisions: list[NodeDecision] | None = None,
        after: frozenset[str] = frozenset(),
    ) -> None:
        self.name, self.after = name, after
        self.rewrite, self.decisions = rewrite, decisions or []
        self.runs = 0

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> list[NodeDecision]:
        self.runs += 1
        self.rewrite(gm)
        return self.decisions


DONE = [NodeDecision("x", True, "done")]


def body() -> fx.GraphModule:
    """Canonical graph of relu(x) + 1 for x [3, 4]."""

    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 1

    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(capture(gm).pieces[0].body.gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Small(), backend=backend)(torch.randn(3, 4))
    return found[0]


def relu_to(target: Any, *further: Any) -> Callable[[fx.GraphModule], None]:
    def rewrite(gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target is aten.relu.default:
                node.target, node.args = target, (*node.args, *further)

    return rewrite


def run(gm: fx.GraphModule, *steps: Step, **options: Any) -> list[str]:
    """Names of the passes whose decisions came back."""
    runner = PassRunner(Options(**options), steps)
    return [name for name, _ in runner.run(gm, PassContext(options=runner.options), "part")]


def test_the_shipped_order_holds() -> None:
    check_order(PIPELINE)
    assert [step.name for step in PIPELINE] == [
        "fuse_projections",
        "quantize_linears",
        "reorder_tokens",
        "select_sparse_pattern",
        "fuse_heads",
        "select_blocks_online",
        "select_head_orders",
        "search_hierarchically",
        "linearize_attention",
        "substitute_means",
        "quantize_attention",
    ]
    assert set(BACKENDS) == {"eager", "inductor"}
    assert all(name == backend.name for name, backend in BACKENDS.items())


def test_a_wrong_order_lists_every_violation() -> None:
    steps = (
        Step("a", after=frozenset({"b", "c"})),
        Step("b", after=frozenset({"c"})),
        Step("c"),
    )
    with pytest.raises(ConfigError) as caught:
        check_order(steps)
    for text in ("a must come after b", "a must come after c", "b must come after c"):
        assert text in str(caught.value)


def test_a_predecessor_that_is_not_in_the_pipeline_does_not_matter() -> None:
    check_order((Step("a", after=frozenset({"elsewhere"})),))


@pytest.mark.parametrize("options", [{"disable": "fuse_head"}, {"stop_after": "fuse_head"}])
def test_an_unknown_name_is_refused_with_the_closest(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"fuse_head'.*fuse_heads"):
        PassRunner(Options(**options))


def test_disable_and_stop_after() -> None:
    steps = [Step(name) for name in "abc"]
    run(body(), *steps, disable="b")
    assert [step.runs for step in steps] == [1, 0, 1]
    run(body(), *steps, stop_after="b")
    assert [step.runs for step in steps] == [2, 1, 1]


def test_stop_after_a_disabled_pass_still_stops_there() -> None:
    steps = [Step(name) for name in "abc"]
    run(body(), *steps, disable="b", stop_after="b")
    assert [step.runs for step in steps] == [1, 0, 0]


def test_fuel_is_shared_by_all_parts_of_a_compilation() -> None:
    steps = [
        Step("a", relu_to(aten.sigmoid.default), DONE),
        Step("b", lambda gm: None, [NodeDecision("x", False, "not now")]),
    ]
    runner = PassRunner(Options(fuel=1), steps)
    context = PassContext(options=runner.options)
    assert [name for name, _ in runner.run(body(), context, "first")] == ["a"]
    second = body()
    assert runner.run(second, context, "second") == []
    assert any(node.target is aten.relu.default for node in second.graph.nodes)


def test_no_fuel_means_no_rewrite() -> None:
    step = Step("a", relu_to(aten.sigmoid.default), DONE)
    assert run(body(), step, fuel=0) == []
    assert step.runs == 0


@pytest.mark.parametrize(
    ("rewrite", "decisions"),
    [
        (lambda gm: None, DONE),
        (relu_to(aten.sigmoid.default), []),
        (relu_to(aten.sigmoid.default), [NodeDecision("x", False, "declined")]),
    ],
    ids=["claims a change", "hides a change", "denies a change"],
)
def test_a_pass_that_lies_is_caught(
    rewrite: Callable[[fx.GraphModule], None], decisions: list[NodeDecision]
) -> None:
    with pytest.raises(CaptureError, match="pass liar on part: its decisions do not match"):
        run(body(), Step("liar", rewrite, decisions))


@pytest.mark.parametrize(
    ("target", "further"),
    [(aten.sum.dim_IntList, ([0],)), (aten.to.dtype, (torch.float64,))],
    ids=["shape", "dtype"],
)
def test_a_pass_that_changes_an_output_is_caught(target: Any, further: tuple[Any, ...]) -> None:
    with pytest.raises(CaptureError, match=r"pass breaker on part changed output 0 from"):
        run(body(), Step("breaker", relu_to(target, *further), DONE))


def test_output_strides_are_restored() -> None:
    def transpose_inside(gm: fx.GraphModule) -> None:
        (node,) = (n for n in gm.graph.nodes if n.target is aten.relu.default)
        with gm.graph.inserting_after(node):
            turned = gm.graph.call_function(aten.clone.default, (node,))
            node.replace_all_uses_with(turned)
            turned.args = (node,)
        turned.kwargs = {"memory_format": torch.contiguous_format}
        with gm.graph.inserting_before(turned):
            column = gm.graph.call_function(aten.t.default, (node,))
            dense = gm.graph.call_function(
                aten.clone.default, (column,), {"memory_format": torch.contiguous_format}
            )
            back = gm.graph.call_function(aten.t.default, (dense,))
        turned.replace_all_uses_with(back)
        gm.graph.erase_node(turned)

    gm = body()
    x = torch.randn(3, 4)
    run(gm, Step("transposer", transpose_inside, DONE))
    assert any(node.target is aten.empty_strided.default for node in gm.graph.nodes)
    (returned,) = output_nodes(gm)
    assert fake_value(returned).stride() == (4, 1)
    (out,) = gm(x)
    assert out.stride() == (4, 1)
    assert torch.equal(out, x.relu() + 1)


def test_every_node_has_a_value_after_a_rewrite() -> None:
    gm = body()
    run(gm, Step("a", relu_to(aten.sigmoid.default), DONE))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert calls
    assert all(isinstance(fake_value(node), torch.Tensor) for node in calls)


def test_dump_writes_each_pass_before_and_after(tmp_path: Path) -> None:
    steps = (Step("first", relu_to(aten.sigmoid.default), DONE), Step("second"))
    run(body(), *steps, dump=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"00{number}_part_{name}.{kind}"
        for number, name in enumerate(("first", "second"))
        for kind in ("after.py", "before.py", "decisions.json")
    ]
    assert "aten.relu" in (tmp_path / "000_part_first.before.py").read_text()
    assert "aten.sigmoid" in (tmp_path / "000_part_first.after.py").read_text()
    assert json.loads((tmp_path / "000_part_first.decisions.json").read_text()) == [
        {"node": "x", "applied": True, "reason": "done"}
    ]


def test_time_is_added_up_by_pass() -> None:
    runner = PassRunner(Options(), (Step("a"),))
    context = PassContext(options=runner.options)
    runner.run(body(), context, "first")
    once = runner.elapsed_ms["a"]
    runner.run(body(), context, "second")
    assert runner.elapsed_ms["a"] > once > 0
