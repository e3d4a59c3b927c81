from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ditopt.graph import placeholders
from ditopt.join import MAX_TOGETHER, MIN_SHARED, Part, join, most_together, spans


def lengths(keys: str) -> list[int]:
    found = spans(keys, min_shared=4)
    assert [k for span in found for k in span] == list(range(len(keys)))
    return [len(span) for span in found]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", []),
        ("a", [1]),
        ("pbbs", [4]),
        ("pabbbs", [6]),
        ("pbbbbbbs", [1, 3, 3, 1]),
        ("pabbbbbbs", [2, 3, 3, 1]),
        ("pbbbbbbbs", [2, 3, 3, 1]),
        ("pbbbbbbbbs", [3, 3, 3, 1]),
        ("pababababs", [1, 2, 2, 2, 2, 1]),
        ("pabcabcabcs", [1, 3, 3, 3, 1]),
        ("pddddddgeeeeees", [1, 3, 3, 1, 3, 3, 1]),
    ],
)
def test_spans(keys: str, expected: list[int]) -> None:
    assert lengths(keys) == expected


@pytest.mark.parametrize(("blocks", "programs"), [(12, 1), (13, 6), (30, 12)])
def test_small_models_stay_whole(blocks: int, programs: int) -> None:
    assert len(spans("p" + "b" * blocks + "s")) == programs


@pytest.mark.parametrize("blocks", range(1, 41))
def test_spans_keep_the_number_of_programs_small(blocks: int) -> None:
    keys = "p" + "b" * blocks + "s"
    programs = {keys[span.start : span.stop] for span in spans(keys)}
    assert lengths(keys)
    assert len(programs) <= len(set(keys))
    if len(keys) - len(set(keys)) >= MIN_SHARED:
        assert max(len(span) for span in spans(keys)) <= MAX_TOGETHER


@pytest.mark.parametrize(("most", "programs"), [(1, 32), (2, 17), (3, 12)])
def test_blocks_that_take_long_stay_single(most: int, programs: int) -> None:
    assert len(spans("p" + "b" * 30 + "s", most)) == programs


@pytest.mark.parametrize(("tokens", "most"), [(32_767, MAX_TOGETHER), (32_768, 1)])
def test_long_is_told_by_the_size_of_the_results(tokens: int, most: int) -> None:
    one = part("a", (0,), (1,))
    with FakeTensorMode():
        value = torch.empty(1, tokens, 1024, dtype=torch.bfloat16)
    for node in one.gm.graph.nodes:
        node.meta["val"] = value
    assert most_together([one]) == most


def part(
    key: str, inputs: Sequence[int], outputs: Sequence[int], extra: float | None = None
) -> Part:
    """Output k is the sum of the inputs, plus k, plus an extra input."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{k}") for k in range(len(inputs))]
    if extra is not None:
        nodes.append(graph.placeholder("extra"))
    total = nodes[0]
    for node in nodes[1:]:
        total = graph.call_function(torch.add, (total, node))
    graph.output(tuple(graph.call_function(torch.add, (total, k)) for k in range(len(outputs))))
    extras = () if extra is None else ((lambda env: torch.tensor(extra)),)
    gm = fx.GraphModule(nn.Module(), graph)
    return Part(key, gm, tuple(inputs), tuple(outputs), extras, kernels=1)


def run(one: Part, env: dict[int, float]) -> dict[int, float]:
    values = [torch.tensor(env[slot]) for slot in one.inputs]
    results = one.gm(*values, *[extra([]) for extra in one.extras])
    return {slot: float(value) for slot, value in zip(one.outputs, results, strict=True)}


def test_a_joined_part_does_what_its_parts_do() -> None:
    parts = [
        part("a", (0, 1), (3, 4)),
        part("b", (4, 0), (5,), 10.0),
        part("c", (5, 2), (6,), 20.0),
    ]
    env = {0: 1.0, 1: 2.0, 2: 3.0}
    apart = dict(env)
    for one in parts:
        apart.update(run(one, apart))
    joined = join(parts, {3, 6})
    assert joined.inputs == (0, 1, 2)
    assert joined.outputs == (3, 6)
    assert len(joined.extras) == 2
    assert joined.kernels == 3
    assert run(joined, env) == {3: apart[3], 6: apart[6]}


def test_one_part_stays_itself() -> None:
    one = part("a", (0,), (1,))
    assert join([one], {1}) is one


def test_equal_stretches_have_equal_keys() -> None:
    def stretch(start: int) -> Part:
        parts = [part("b", (0, start + k), (start + k + 1,)) for k in range(3)]
        return join(parts, {start + 3})

    assert stretch(5).key == stretch(8).key
    assert len(placeholders(stretch(5).gm)) == 2


def test_other_wiring_or_other_results_give_other_keys() -> None:
    def two(second: Sequence[int], later: set[int]) -> Part:
        return join([part("b", (0, 1), (2,)), part("b", second, (3,))], later)

    keys = [
        two((0, 2), {3}).key,
        two((1, 2), {3}).key,
        two((2, 0), {3}).key,
        two((0, 2), {2, 3}).key,
    ]
    assert len(set(keys)) == 4


def test_attributes_of_the_graphs_come_along() -> None:
    def with_attribute(value: float, inputs: tuple[int], outputs: tuple[int]) -> Part:
        root = nn.Module()
        root.register_buffer("table", torch.tensor(value))
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.mul, (x, graph.get_attr("table"))),))
        return Part(value, fx.GraphModule(root, graph), inputs, outputs, (), 0)

    joined = join([with_attribute(2.0, (0,), (1,)), with_attribute(3.0, (1,), (2,))], {2})
    assert run(joined, {0: 5.0}) == {2: 30.0}
