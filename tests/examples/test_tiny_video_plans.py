"""Means of left-out blocks and a recipe on the trained video model, from plan to explanation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_video.sampler import guided_conditions, load_checkpoint
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.inspection import explain_fully
from ditopt.layout import TokenLayout
from ditopt.patterns import Skip, Window
from ditopt.plan import Block, Hardware, ModelRecord, Phase, Plan, Sampler, SiteRecord
from ditopt.plan.schema import MeanRemainder
from ditopt.workload import Workload

GRID = TokenLayout(3, 7, 9)  # of 63 tokens a frame, which no block divides
SITES = [f"blocks.{k}.attn1#0" for k in range(6)]


@pytest.fixture(scope="module")
def inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    model, conditions = load_checkpoint()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 3, GRID.frames, 4 * GRID.height, 4 * GRID.width, generator=generator)
    return model, {
        "hidden_states": latent.repeat(2, 1, 1, 1, 1),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": guided_conditions(conditions, scene=2, motion=5),
    }


def plan(model: nn.Module, **phase: Any) -> Plan:
    sites = [
        SiteRecord(id=f"blocks.{k}.attn{n}#0", kind=kind, heads=4, head_dim=64)
        for k in range(6)
        for n, kind in ((1, "self"), (2, "cross"))
    ]
    return Plan(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name="VideoDiT",
            sites=tuple(sites),
        ),
        sampler=Sampler(calls=1),
        hardware=Hardware(device="cpu", name="a CPU", torch=torch.__version__, threads=1),
        layout=GRID,
        block=Block(q=16, k=16),
        phases=(Phase(calls=(0, 1), **phase),),
    )


def test_means_come_closer_and_are_explained(inputs: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, arguments = inputs
    window = Window(frames=1, rows=5, cols=5)
    attention = dict.fromkeys(SITES, (window, window, window, Skip()))
    means = dict.fromkeys(SITES, MeanRemainder())
    plans = [plan(model, attention=attention), plan(model, attention=attention, remainders=means)]
    errors = []
    with torch.no_grad():
        dense = model(**arguments)
        for made in plans:
            torch._dynamo.reset()
            run = torch.compile(model, backend="ditopt_eager", options={"plan": made})
            errors.append(float((run(**arguments) - dense).norm() / dense.norm()))
    assert 0 < errors[1] < 0.8 * errors[0]

    workload = Workload(model, lambda model, seed: model(**arguments))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(explain_fully(workload, plans[1]).table())
    assert "substitute_means" in capture.get()
    assert "the mean of each key block stands for it where it is left out" in capture.get()
