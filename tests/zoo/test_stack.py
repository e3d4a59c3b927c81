"""The block stack of every architecture, and a step that leaves it out."""

from __future__ import annotations

import pytest
import torch

from ditopt.backends.eager import EagerBackend
from ditopt.config import Options
from ditopt.part_maker import Phase
from ditopt.program import ProgramBuilder
from ditopt.runtime import InputRoles, StepRuntime, StepSchedule, TrajectoryTracker, session
from ditopt.stack import Stack, find_stack

from .models import ZOO
from .runs import BROKEN, ONE_GRAPH, relative_l2, run

# First and last block, and how many values leave the stack. FLUX.2 and Chroma compute modulations
# between the two kinds of blocks, so the stack is the heavier kind, which carries image and text.
# Only reshaping lies between HunyuanVideo's text refiner and its blocks: one stack.
REFINER = "context_embedder.token_refiner.refiner_blocks.0"
EXPECTED = {
    "dit": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "pixart": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "sana": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "sd3": ("transformer_blocks.0", "transformer_blocks.2", 1),
    "flux": ("transformer_blocks.0", "single_transformer_blocks.1", 1),
    "flux2": ("transformer_blocks.0", "transformer_blocks.1", 2),
    "chroma": ("transformer_blocks.0", "transformer_blocks.1", 2),
    "qwen_image": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "cogview4": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "z_image": ("layers.0", "layers.1", 1),
    "wan": ("blocks.0", "blocks.1", 1),
    "wan_i2v": ("blocks.0", "blocks.1", 1),
    "hunyuan_video": (REFINER, "single_transformer_blocks.1", 1),
    "cogvideox": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "ltx": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "latte": ("transformer_blocks.0", "transformer_blocks.1", 1),
    "sana_video": ("transformer_blocks.0", "transformer_blocks.1", 1),
}
# The stream is transposed between frames and pixels, so no input has the shape of the output, and
# a skipped step forecasts the output itself.
WITHOUT_BASE = {"latte"}

WHEN = ("static", "dynamic")


def graph_and_stack(name: str, when: str):
    (graph,) = getattr(run(name), when)
    stack = find_stack(graph.captured)
    assert isinstance(stack, Stack), stack
    return graph, stack


def runtime(graph, stack, schedule=None, *, fuse=False) -> StepRuntime:
    options = Options(fuse_projections=fuse)
    sites = graph.compiled.attention
    builder = ProgramBuilder(graph.captured, sites, EagerBackend(), options, torch.device("cpu"))
    names = [
        None if item.role in ("parameter", "buffer") else item.name
        for item in graph.captured.inputs
        if item.role != "constant"
    ]
    roles = InputRoles.from_names(names, timestep=None, varying=())
    tracker = None if schedule is None else TrajectoryTracker(schedule)
    return StepRuntime(builder.build([Phase()], stack, roles), schedule, tracker)


def assert_same(results, expected):
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(result, wanted)
        else:
            assert result == wanted


def test_the_table_has_every_model():
    assert set(EXPECTED) == set(ONE_GRAPH)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_and_bases(name, when):
    graph, stack = graph_and_stack(name, when)
    pieces = graph.captured.pieces
    found = (pieces[stack.first].path, pieces[stack.end - 1].path, len(stack.outputs))
    assert found == EXPECTED[name]
    assert (None in stack.bases) == (name in WITHOUT_BASE)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", EXPECTED)
def test_full_steps_are_bit_equal(name, when):
    graph, stack = graph_and_stack(name, when)
    with torch.no_grad():
        expected = graph.gm(*graph.arguments)
        assert_same(runtime(graph, None)(*graph.arguments), expected)
        assert_same(runtime(graph, stack)(*graph.arguments), expected)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_reused_residual_at_equal_inputs_gives_the_same_output(name, when):
    graph, stack = graph_and_stack(name, when)
    steps = runtime(graph, stack, StepSchedule.build(3, [0, 1], {2: [1.0]}))
    with torch.no_grad(), session("run"):
        expected = graph.gm(*graph.arguments)
        for _ in range(2):
            assert_same(steps(*graph.arguments), expected)
        reused = steps(*graph.arguments)
    assert (steps.artifact.counters.full, steps.artifact.counters.skipped) == (2, 1)
    for result, wanted in zip(reused, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            assert relative_l2(result, wanted) <= 1e-6


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_model_has_a_reason_or_a_stack_of_its_own_blocks(name):
    for graph in run(name).static:
        found = find_stack(graph.captured)
        if isinstance(found, str):
            assert found == "no repeated blocks were found in the graph"
        else:
            paths = [piece.path for piece in graph.captured.pieces[found.first : found.end]]
            assert all(run(name).model.get_submodule(path) is not None for path in paths if path)


def test_zoo_is_covered():
    assert set(EXPECTED) | set(BROKEN) == set(ZOO)
