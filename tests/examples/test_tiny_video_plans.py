"""Means of left-out blocks and a recipe on the trained video model, from plan to explanation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny_video.sampler import guided_conditions, load_checkpoint
from torch import Tensor, nn

from ditopt import fingerprint
from ditopt.inspection import explain_fully
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.kernels.block_sparse_attention.reference_8bit import block_sparse_attention_8bit
from ditopt.layout import TokenLayout
from ditopt.metrics import psnr
from ditopt.patterns import Skip, Window
from ditopt.plan import Block, Hardware, ModelRecord, Phase, Plan, Sampler, SiteRecord
from ditopt.plan.schema import MeanRemainder
from ditopt.quantization.arithmetic import ArithmeticRule
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


def test_8_bit_attention_is_its_reference(
    inputs: tuple[nn.Module, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled model beside one whose self-attentions are the kernel's reference."""
    model, arguments = inputs
    rule = ArithmeticRule(kind="int8_qk_e4m3_pv", simulate=True)
    made = plan(model, arithmetic=dict.fromkeys(SITES, rule))
    blocks = -(-GRID.tokens // 16)
    lists = from_blocks(torch.ones(1, 1, blocks, blocks, dtype=torch.bool))

    def attention(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        if k.shape[2] != GRID.tokens:
            return exact(q, k, v, **given)
        place = (16, 16, q.shape[-1] ** -0.5)
        return block_sparse_attention_8bit(q, k, v, *lists, *place, values=True).float()

    exact = F.scaled_dot_product_attention
    torch._dynamo.reset()
    with torch.no_grad():
        dense = model(**arguments)
        out = torch.compile(model, backend="ditopt_eager", options={"plan": made})(**arguments)
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        expected = model(**arguments)
    own = float((expected - dense).norm() / dense.norm())
    assert float((out - expected).norm() / dense.norm()) < 0.1 * own
    assert 20.0 < psnr(out, dense) < 80.0


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
