from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.config import Options
from ditopt.graph import fake_value, output_nodes
from ditopt.kernels.block_sparse_attention import ops_8bit, reference_8bit
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.passes.base import ArithmeticChoice, BlockLists, SparseChoice
from ditopt.passes.fuse_heads import FuseHeads
from ditopt.passes.quantize_attention import IN_8_BITS, SIMULATED, QuantizeAttention
from ditopt.passes.select_sparse_pattern import BLOCK_SPARSE, SelectSparsePattern
from ditopt.sites import SDPA

H, N, D, BLOCK = 2, 29, 8, 8  # the last block has 5 tokens
ROWS = -(-N // BLOCK)
LISTED = (SelectSparsePattern(), FuseHeads(), QuantizeAttention())
NO_KERNEL = "the 8-bit kernel is for compute capability 9.0, the device is cpu"


class Attention(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(H * D, H * D) for _ in "qkv")
        self.given = given

    def heads(self, x: Tensor) -> list[Tensor]:
        layers = (self.to_q, self.to_k, self.to_v)
        return [layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        out = scaled_dot_product_attention(*self.heads(x), **self.given)
        return out.transpose(1, 2).flatten(-2)


class Cross(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return scaled_dot_product_attention(q, k[:, :, 3:], v[:, :, 3:])


class Narrow(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return scaled_dot_product_attention(q, k, v[..., 2:])


class Shared(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def tokens() -> Tensor:
    return 3 * torch.randn(1, N, H * D, generator=torch.Generator().manual_seed(2))


def wishes(
    graph: Any, kind: str = "int8_qk", *, listed: bool = False, simulate: bool = True
) -> dict[str, Any]:
    (node,) = graph.nodes(SDPA)
    wanted = {"arithmetic": {node.name: ArithmeticChoice(kind, simulate, BLOCK, BLOCK, listed)}}
    sparse = {"sparse": {node.name: SparseChoice(BLOCK, BLOCK, H, N, N)}}
    return {**wanted, **(sparse if listed else {})}


def some_lists() -> list[Tensor]:
    keep = torch.stack([torch.eye(ROWS).bool(), torch.ones(ROWS, ROWS).tril().bool()])
    return list(from_blocks(keep[None]))


def every_list() -> list[Tensor]:
    return list(from_blocks(torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool)))


def by_hand(graph: Any, lists: list[Tensor], kind: str) -> Tensor:
    with torch.no_grad():
        q, k, v = graph.module.heads(graph.inputs[0])
        exact = reference_8bit.block_sparse_attention_8bit(
            q, k, v, *lists, BLOCK, BLOCK, D**-0.5, values=kind == "int8_qk_e4m3_pv"
        )
    return exact.transpose(1, 2).flatten(-2).float()


@pytest.mark.parametrize("kind", ["int8_qk", "int8_qk_e4m3_pv"])
@pytest.mark.parametrize("listed", [False, True], ids=["dense", "lists"])
def test_the_reference_s_numbers(harness: Any, kind: str, listed: bool) -> None:
    graph = harness(Attention(), tokens())
    decision = graph.run(*LISTED, **wishes(graph, kind, listed=listed))[-1]
    what = "the site's lists" if listed else "every block"
    assert decision.applied
    assert decision.reason == (
        f"{kind} on {what}, blocks of 8 x 8 tokens, simulated and slower: {NO_KERNEL}"
    )
    assert [len(graph.nodes(t)) for t in (SDPA, BLOCK_SPARSE, IN_8_BITS, SIMULATED)] == [0, 0, 0, 1]
    lists = some_lists() if listed else every_list()
    specs = [n.meta["ditopt"] for n in graph.gm.graph.nodes if n.meta.get("ditopt")]
    assert specs == [BlockLists(decision.node, part) for part in (0, 1)]
    torch.testing.assert_close(graph.result(lists), by_hand(graph, lists, kind))


def test_it_differs_from_the_model_by_rounding(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    graph.run(QuantizeAttention(), **wishes(graph))
    with torch.no_grad():
        dense = graph.module(graph.inputs[0])
    assert 1e-4 < float((graph.result(every_list()) - dense).norm() / dense.norm()) < 0.03


def test_the_scale_of_the_call_is_kept(harness: Any) -> None:
    graph = harness(Attention(scale=0.125), tokens())
    graph.run(QuantizeAttention(), **wishes(graph))
    (call,) = graph.nodes(SIMULATED)
    assert call.args[5:] == (BLOCK, BLOCK, 0.125, False)


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "lists"])
def test_a_second_run_finds_nothing(harness: Any, listed: bool) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph, listed=listed)
    graph.run(*LISTED, **wanted)
    assert graph.run(*LISTED, **wanted) == []


def test_outputs_keep_shape_and_strides(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    (before,) = (fake_value(n) for n in output_nodes(graph.gm))
    graph.run(QuantizeAttention(), **wishes(graph))
    (after,) = (fake_value(n) for n in output_nodes(graph.gm))
    assert (after.shape, after.stride()) == (before.shape, before.stride())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            Attention(attn_mask=torch.ones(N, N).tril().bool()),
            "the attention has a mask, which the 8-bit kernel does not take",
        ),
        (Attention(is_causal=True), "the attention is causal"),
        (Cross(), "queries and keys are different sequences"),
        (Narrow(), "values have 6 channels, queries have 8"),
        (Shared(), "q and k have different numbers of heads"),
    ],
    ids=["mask", "causal", "cross", "values", "groups"],
)
def test_declined_by_shape(harness: Any, module: nn.Module, reason: str) -> None:
    check_declined(harness(module, tokens()), reason, QuantizeAttention())


def test_declined_without_hardware(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph, simulate=False)
    text = f"{NO_KERNEL}, and the plan does not say simulate"
    check_declined(graph, text, QuantizeAttention(), **wanted)


def test_lists_stay_in_the_model_s_arithmetic_without_hardware(harness: Any) -> None:
    graph = harness(Attention(), tokens())
    graph.run(*LISTED, **wishes(graph, listed=True, simulate=False))
    assert len(graph.nodes(BLOCK_SPARSE)) == 1


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ((), "the site's patterns were not applied, so there are no lists to go with"),
        ((SelectSparsePattern(),), "the attention is not one launch for all heads"),
    ],
    ids=["no patterns", "by head"],
)
def test_declined_without_one_launch(harness: Any, passes: Any, reason: str) -> None:
    graph = harness(Attention(), tokens())
    wanted = wishes(graph, listed=True)
    graph.run(*passes, **wanted) if passes else None
    check_declined(graph, reason, QuantizeAttention(), **wanted)


def check_declined(graph: Any, reason: str, step: Any, **wanted: Any) -> None:
    code = graph.gm.code
    (decision,) = graph.run(step, **(wanted or wishes(graph)))
    assert (decision.applied, decision.reason) == (False, reason)
    assert graph.gm.code == code


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (8, 9)}, "the 8-bit kernel is for compute capability 9.0"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, q is torch.float32"),
        ({"channels": 72}, "takes 64 and 128 channels, got 72"),
        ({"block_q": 64}, r"takes multiples of 128 as block_q, got 64"),
        ({"block_k": 256}, "takes 64 and 128 as block_k, got 256"),
        ({}, None),
    ],
    ids=["capability", "dtype", "channels", "block_q", "block_k", "none"],
)
def test_what_the_kernel_takes(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str | None
) -> None:
    """A Hopper GPU's answers, without one."""
    pytest.importorskip("triton.experimental.gluon")
    from ditopt.kernels.block_sparse_attention import hopper_8bit

    given = {"capability": (9, 0), "dtype": torch.bfloat16, "channels": 128, "block_q": 128}
    given |= {"block_k": 128} | change
    monkeypatch.setattr(hopper_8bit, "device", lambda _: (0, 132, given["capability"]))
    q = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=given["dtype"], shape=(1, 2, 256, given["channels"])
    )
    found = ops_8bit.reason_to_decline(q, given["block_q"], given["block_k"])  # type: ignore[arg-type]
    assert found is None if reason is None else reason in str(found)


def test_a_cuda_graph_cannot_hold_the_simulation(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = harness(Attention(), tokens())
    module = sys.modules[QuantizeAttention.__module__]
    on_cuda = SimpleNamespace(is_cuda=True, shape=(1, H, N, D), dim=lambda: 4)
    monkeypatch.setattr(module, "fake_value", lambda _: on_cuda)
    monkeypatch.setattr(module, "reject", lambda *_: None)
    monkeypatch.setattr(ops_8bit, "reason_to_decline", lambda *_: NO_KERNEL)
    decisions = graph.run(QuantizeAttention(), options=Options(cuda_graphs=True), **wishes(graph))
    assert [d.reason for d in decisions] == [
        "simulated products wait for the device, which a CUDA graph cannot"
    ]
