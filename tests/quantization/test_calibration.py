"""Codebooks whose assignments are calibrated block by block, and plans that carry them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.errors import DitoptError
from ditopt.quantization.assignments import Assignments
from ditopt.quantization.block_calibration import (
    BlockRecord,
    Calibration,
    blocks_of,
    calibrate,
    record,
)
from ditopt.quantization.codebook import Codebook, nearest_words, pieces_of
from ditopt.quantization.plans import candidates
from ditopt.torch_backend import compiled_graphs
from ditopt.workload import Workload

from .small_model import Model, plan_for

X, T = (torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (33, 1))
CODEBOOK = {"format": "codebook", "calibrated": True}
LAYERS = [f"blocks.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out", "up", "down")]
SETTINGS = Calibration(steps=40, words_rate=2e-3, ratio_rate=0.1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def workload(model: Model) -> Workload:
    def sample(model: Any, seed: int) -> Tensor:
        x = draw(2, 33, 64, seed=seed)
        for _ in range(3):
            x = x - 0.1 * model(x, T[:, 0])
        return x

    return Workload(model, sample)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(blocks=1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calibrated(model: Model) -> tuple[dict[str, Tensor], list[BlockRecord]]:
    return calibrate(workload(model), {"blocks.0": LAYERS}, SETTINGS, calls=2)


def decoded(tensors: dict[str, Tensor], layer: str, n: int, k: int) -> Tensor:
    parts = {name: tensors[f"linear/{name}/{layer}"] for name in ("codes", "words", "scale")}
    back: Tensor = Codebook().decode(parts, n, k, torch.float32)
    return back


def test_candidates_are_the_nearest_words() -> None:
    weight = draw(48, 64)
    soft = Assignments(weight, 3)
    pieces, _ = pieces_of(weight)
    distances = torch.cdist(pieces, soft.words.detach())
    assert torch.equal(soft.candidates, distances.argsort(1)[:, :3])
    assert torch.equal(soft.candidates, nearest_words(pieces, soft.words.detach(), 3))
    ratios = soft.ratios.detach()
    assert bool((ratios[:, 0] >= ratios[:, 1]).all())
    torch.testing.assert_close(ratios.sum(1), torch.ones(len(ratios)))


def test_a_decided_piece_is_its_word() -> None:
    weight = draw(64, 128)
    soft = Assignments(weight, 2)
    assert float(soft.undecided().detach()) > 0.1
    before = soft.parts()
    soft.settle(0.5)
    assert float(soft.undecided().detach()) == 0
    back = Codebook().decode(soft.parts(), 64, 128, torch.float32)
    torch.testing.assert_close(soft.weight().detach(), back, rtol=1e-3, atol=1e-3)  # fp16 words
    assert torch.equal(before["codes"], soft.parts()["codes"])
    loss = soft.weight().square().sum() + soft.undecided()
    loss.backward()
    assert soft.logits.grad is not None
    assert float(soft.logits.grad.abs().max()) < 1e-30


def test_one_candidate_is_plain_k_means() -> None:
    weight = draw(16, 32)
    parts, plain = Assignments(weight, 1).parts(), Codebook().encode(weight)
    assert all(torch.equal(parts[name], value) for name, value in plain.items())


def test_a_block_comes_nearer_to_the_float_block(
    calibrated: tuple[dict[str, Tensor], list[BlockRecord]],
) -> None:
    tensors, (told,) = calibrated
    assert told.path == "blocks.0"
    assert told.after < 0.9
    assert 0 < told.decided <= 1
    assert {key.rpartition("/")[2] for key in tensors} == set(LAYERS)


def test_words_that_are_no_better_are_not_taken(model: Model) -> None:
    """With steps that are far too large the first words stay."""
    wild = Calibration(steps=3, words_rate=10.0)
    tensors, (told,) = calibrate(workload(model), {"blocks.0": LAYERS[-1:]}, wild, calls=1)
    assert told.after > 1
    plain = Codebook().encode(model.blocks[0].down.weight)
    for name, value in plain.items():
        assert torch.equal(tensors[f"linear/{name}/blocks.0.down"], value)


def test_blocks_are_recorded_at_the_same_calls() -> None:
    torch.manual_seed(0)
    two = Model(blocks=2).eval().requires_grad_(False)
    examples = record(workload(two), two, ["blocks.0", "blocks.1"], 0, 2)
    assert [len(found) for found in examples.values()] == [2, 2]
    for (_, _, out), (args, _, _) in zip(*examples.values(), strict=True):
        assert torch.equal(out, args[0])


@torch.no_grad()
def test_a_plan_carries_them(
    model: Model, calibrated: tuple[dict[str, Tensor], list[BlockRecord]]
) -> None:
    torch._dynamo.reset()
    tensors, _ = calibrated
    plan = plan_for(model, dict.fromkeys(LAYERS, CODEBOOK), statistics=tensors)
    run = torch.compile(model, backend="ditopt_eager", options={"plan": plan})
    out = run(X, T[:, 0])
    graph = compiled_graphs(model)[-1]
    assert all(d.applied for d in graph.decisions if d.rule == "quantize_linears")
    alone = {d.reason for d in graph.decisions if d.rule == "fuse_projections"}
    assert alone == {"each layer has a calibrated codebook of its own"}
    assert blocks_of(graph, candidates(graph, min_rows=32)) == {"blocks.0": LAYERS}

    exact = Model(blocks=1)
    exact.load_state_dict(model.state_dict())
    for layer in LAYERS:
        weight = exact.get_parameter(f"{layer}.weight")
        weight.copy_(decoded(tensors, layer, *weight.shape))
    torch.testing.assert_close(out, exact(X, T[:, 0]), rtol=1e-4, atol=1e-4)

    kept = model.blocks[0].up.weight.clone()
    model.blocks[0].up.weight.add_(0.01)
    with pytest.raises(DitoptError, match="has changed since its calibration"):
        run(X, T[:, 0])
    model.blocks[0].up.weight.copy_(kept)


@torch.no_grad()
def test_codes_that_are_missing_or_of_another_shape(
    model: Model, calibrated: tuple[dict[str, Tensor], list[BlockRecord]]
) -> None:
    torch._dynamo.reset()
    tensors, _ = calibrated
    wrong = {key.replace("/blocks.0.down", "/blocks.0.up"): v for key, v in tensors.items()}
    wrong = {key: v for key, v in wrong.items() if key.endswith("up")}
    wrong["linear/codes/blocks.0.up"] = tensors["linear/codes/blocks.0.down"]
    plan = plan_for(model, dict.fromkeys(LAYERS[-2:], CODEBOOK), statistics=wrong)
    torch.compile(model, backend="ditopt_eager", options={"plan": plan})(X, T[:, 0])
    graph = compiled_graphs(model)[-1]
    assert {d.site: d.reason for d in graph.decisions if d.rule == "quantize_linears"} == {
        "blocks.0.up": "the plan's codes have shape (64, 32), the layer has N = 128, K = 64",
        "blocks.0.down": "the plan's side file holds no calibrated codebook of the layer",
    }
