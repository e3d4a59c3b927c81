"""Errors of 8-bit attention at a site: those of the reference; times only where a kernel is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditopt.kernels.block_sparse_attention import ops_8bit, reference_8bit
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.plan import Block
from ditopt.profiling.arithmetics import (
    ARITHMETICS,
    NOT_OFFERED,
    arithmetic_errors,
    arithmetic_runs,
    what_is_left_out,
)
from ditopt.profiling.schema import AttentionCost, Costs, SiteShape

N, BLOCK = 77, 16  # the last block has 13 tokens
CPU = torch.device("cpu")
SHAPE = SiteShape(batch=2, heads=3, tokens=N, head_dim=32, dtype="float32")


def operands(tokens: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, tokens, 32, generator=generator)
    return 2 * q, k + 3, v * torch.tensor([0.1, 1.0, 10.0])[:, None, None]


def by_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[N, H, A] squared errors from the kernel's reference in float64."""
    blocks = -(-q.shape[2] // BLOCK)
    lists = from_blocks(torch.ones(1, 1, blocks, blocks, dtype=torch.bool))
    dense = (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()
    errors = [
        reference_8bit.block_sparse_attention_8bit(
            q, k, v, *lists, BLOCK, BLOCK, scale, values=kind == "int8_qk_e4m3_pv"
        )
        - dense
        for kind in ARITHMETICS
    ]
    return torch.stack([e.square().sum((0, 3)).T for e in errors], 2)


@pytest.mark.parametrize("scratch", [1 << 30, 1], ids=["at once", "row by row"])
def test_errors_are_the_reference_s(scratch: int) -> None:
    q, k, v = operands()
    found = arithmetic_errors(q, k, v, block_k=BLOCK, scale=0.2, scratch_bytes=scratch)
    # The profile computes in float32: what lies between two e4m3 numbers may round the other way.
    torch.testing.assert_close(found, by_query(q, k, v, 0.2).sum(0), rtol=1e-4, atol=0)
    assert found.shape == (3, 2)
    assert (found[:, 1] > found[:, 0]).all()  # e4m3 on top


def test_some_queries_stand_for_all() -> None:
    q, k, v = operands(400)
    some = arithmetic_errors(q, k, v, block_k=BLOCK, scale=0.2, queries=100)
    each = by_query(q, k, v, 0.2)
    deviation = each.std(0) * 400 / 100**0.5  # of a sum that is estimated from 100 of 400
    assert ((some - each.sum(0)).abs() <= 4 * deviation).all()


def costs(source: str = "measured", **changes: Any) -> Costs:
    made = AttentionCost(shape=SHAPE, dense_ms=2.0, sparse_ms=((1.0, 2.0), (0.5, 1.0)), **changes)
    return Costs(dense_call_ms=9.0, skip_call_ms=1.0, attention=(made,), source=source)


def test_a_cpu_offers_nothing_and_says_why() -> None:
    assert arithmetic_runs(*operands(), Block(q=BLOCK, k=BLOCK)) == {}
    reason = "the 8-bit kernel is for compute capability 9.0, the device is cpu"
    assert what_is_left_out(costs(), Block(), CPU) == (NOT_OFFERED + reason,)
    by_rates = what_is_left_out(costs("roofline"), Block(), CPU)
    assert by_rates == (NOT_OFFERED + "peak rates do not tell its time",)


def test_what_was_timed_needs_no_note() -> None:
    assert what_is_left_out(costs(arithmetic_ms={"int8_qk": 1.5}), Block(), CPU) == ()


def test_times_are_of_the_operator_on_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_8bit, "reason_to_decline", lambda *_: None)
    q, k, v = operands()
    runs = arithmetic_runs(q, k, v, Block(q=BLOCK, k=BLOCK))
    assert tuple(runs) == ARITHMETICS
    dense = (q @ k.mT * 32**-0.5).softmax(-1) @ v
    for run in runs.values():
        assert float((run() - dense).norm() / dense.norm()) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
def test_a_hopper_times_both() -> None:
    from ditopt.profiling.cost import measure_attention

    shape = SiteShape(batch=1, heads=4, tokens=1000, head_dim=128, dtype="bfloat16")
    table = measure_attention(shape, Block(q=128, k=128), torch.device("cuda"))
    assert set(table.arithmetic_ms) == set(ARITHMETICS)
    assert min(table.arithmetic_ms.values()) > 0
