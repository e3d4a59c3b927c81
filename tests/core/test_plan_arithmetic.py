"""8-bit attention in plans: schema, refusals, and compiled models that give the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditopt import fingerprint
from ditopt.backends.aoti import AotiExporter
from ditopt.backends.onnx import OnnxExporter
from ditopt.errors import EngineError, PlanError
from ditopt.kernels.block_sparse_attention import ops_8bit, reference_8bit
from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.patterns import block_lists
from ditopt.plan import Plan
from ditopt.quantization.arithmetic import ArithmeticRule
from ditopt.torch_backend import compiled_graphs

from .test_plan_attention import (
    BAND,
    PATTERNS,
    SITES,
    Model,
    compiled,
    dense,
    document,
    error,
    latent,
    once,
    plan,
)

KINDS = ("int8_qk", "int8_qk_e4m3_pv")
EIGHT = {site: {"kind": "int8_qk", "simulate": True} for site in SITES}
NOT_HERE = {site: {"kind": "int8_qk"} for site in SITES}
MISSING = "the 8-bit kernel is for compute capability 9.0, the device is cpu"


@pytest.fixture
def small() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def simulated(kind: str) -> dict[str, Any]:
    return {site: {"kind": kind, "simulate": True} for site in SITES}


def by_hand(model: Model, kind: str, lists: tuple[Tensor, Tensor]) -> Tensor:
    """The model with its attention computed by the reference of the kernel."""
    with torch.no_grad():
        x = model.embed(latent()).flatten(2).transpose(1, 2) + torch.zeros(32) + 1.0
        for block in model.blocks:
            layers = (block.to_q, block.to_k, block.to_v)
            q, k, v = (3 * f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in layers)
            out = reference_8bit.block_sparse_attention_8bit(
                q, k, v, *lists, 16, 16, 0.25, values=kind == "int8_qk_e4m3_pv"
            )
            x = x + block.out(out.float().transpose(1, 2).flatten(-2))
        return model.head(x)


def decisions(model: torch.nn.Module) -> list[tuple[str, bool, str]]:
    told = compiled_graphs(model)[-1].decisions
    return [(d.site, d.applied, d.reason) for d in told if d.rule == "quantize_attention"]


def test_a_plan_with_arithmetic_survives_a_round_trip(small: Model) -> None:
    made = plan(document(small, arithmetic=EIGHT, attention=PATTERNS))
    rule = ArithmeticRule(kind="int8_qk", simulate=True)
    assert made.phases[0].arithmetic == dict.fromkeys(SITES, rule)
    assert Plan.from_text(made.to_text()) == made
    assert plan(document(small)).phases[0].arithmetic == {}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"kind": "int4"}, r"kind: input should be 'int8_qk' or 'int8_qk_e4m3_pv', got 'int4'"),
        ({}, "kind: missing"),
        ({"kind": "int8_qk", "format": "x"}, "format: unknown key"),
        ({"kind": "int8_qk", "simulate": 1}, "simulate: input should be a valid boolean"),
    ],
)
def test_bad_rules_are_refused_by_field(small: Model, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(document(small, arithmetic={SITES[0]: rule}))


def test_sites_that_cannot_have_one_are_refused(small: Model) -> None:
    with pytest.raises(PlanError, match=r"phases\[0\].arithmetic\['blocks.9#0'\]: no such site"):
        plan(document(small, arithmetic={"blocks.9#0": EIGHT[SITES[0]]}))
    selector = {SITES[0]: {"kind": "pooled_top_k", "density": 0.5}}
    with pytest.raises(PlanError, match=r"arithmetic\['blocks.0#0'\]: .* in `selectors` too"):
        plan(document(small, arithmetic=EIGHT, selectors=selector))
    means = {SITES[1]: {"kind": "mean"}}
    with pytest.raises(PlanError, match=r"arithmetic\['blocks.1#0'\]: .* in `remainders` too"):
        plan(document(small, arithmetic=EIGHT, attention=PATTERNS, remainders=means))
    made = document(small, arithmetic=EIGHT)
    made["model"]["sites"][1]["kind"] = "cross"
    with pytest.raises(PlanError, match="cross-attention keeps its own arithmetic"):
        plan(made)


def test_dense_attention_in_8_bits_is_the_reference(small: Model) -> None:
    kind = "int8_qk_e4m3_pv"
    made = document(small, arithmetic=simulated(kind))
    made["layout"] = None  # every block: no grid is needed
    with torch.no_grad():
        out = compiled(small, plan(made))(latent(), torch.zeros(32), torch.ones(1))
    every = from_blocks(torch.ones(1, 1, 7, 7, dtype=torch.bool))
    torch.testing.assert_close(out, by_hand(small, kind, every))
    assert 1e-5 < error(out, dense(small)) < 0.05
    text = f"{kind} on every block, blocks of 16 x 16 tokens, simulated and slower: {MISSING}"
    assert decisions(small) == [(site, True, text) for site in SITES]


def test_patterns_in_8_bits_are_the_reference(small: Model) -> None:
    made = plan(document(small, arithmetic=EIGHT, attention=PATTERNS))
    with torch.no_grad():
        out = compiled(small, made)(latent(), torch.zeros(32), torch.ones(1))
    patterns = made.phases[0].attention[SITES[0]]
    lists = block_lists(patterns, made.layout, 105, 105, 16, 16, torch.device("cpu"))
    torch.testing.assert_close(out, by_hand(small, "int8_qk", lists))
    assert [applied for _, applied, _ in decisions(small)] == [True, True]


def test_patterns_that_keep_everything_need_no_lists(small: Model) -> None:
    """Dispatch would leave such a site to dense attention; its arithmetic stays."""
    everything = {site: [{"kind": "dense"}] * 2 for site in SITES}
    out = once(small, arithmetic=EIGHT, attention=everything)
    torch.testing.assert_close(out, once(small, arithmetic=EIGHT))


def test_a_dense_head_among_sparse_ones_stays_in_the_launch(small: Model) -> None:
    mixed = {SITES[0]: [BAND, {"kind": "dense"}]}
    once(small, arithmetic={SITES[0]: EIGHT[SITES[0]]}, attention=mixed)
    assert [(site, applied) for site, applied, _ in decisions(small)] == [(SITES[0], True)]


def test_inductor_gives_the_same(small: Model) -> None:
    out = once(small, "ditopt", arithmetic=simulated("int8_qk_e4m3_pv"), attention=PATTERNS)
    expected = once(small, arithmetic=simulated("int8_qk_e4m3_pv"), attention=PATTERNS)
    # A last bit before the rounding may be a step behind it.
    assert error(out, expected) < 0.2 * error(expected, once(small, attention=PATTERNS)) + 1e-6


def test_without_a_kernel_the_model_s_arithmetic_stays(small: Model) -> None:
    lists = {SITES[1]: PATTERNS[SITES[1]]}
    out = once(small, arithmetic=NOT_HERE, attention=lists)
    text = f"{MISSING}, and the plan does not say simulate"
    assert decisions(small) == [(site, False, text) for site in SITES]
    assert torch.equal(out, once(small, attention=lists))


def test_phases_choose_on_their_own(small: Model) -> None:
    made = document(small, calls=2)
    made["phases"] = [{"calls": [0, 1]}, {"calls": [1, 2], "arithmetic": EIGHT}]
    arguments = (latent(), torch.zeros(32))
    with torch.no_grad():
        run = compiled(small, plan(made))
        first, second = (run(*arguments, torch.tensor([1.0 - 0.5 * k])) for k in range(2))
        expected = small(*arguments, torch.tensor([0.5]))
    torch.testing.assert_close(first, dense(small))
    assert 1e-5 < error(second, expected) < 0.05


def test_a_program_serves_several_resolutions(small: Model) -> None:
    """Lists of every block are made from the sizes of each call."""
    made = document(small, arithmetic=EIGHT)
    made["layout"] = None
    torch._dynamo.reset()
    run = torch.compile(small, backend="ditopt_eager", dynamic=True, options={"plan": plan(made)})
    for rows in (5, 8):
        x = torch.randn(1, 3, 3, 2 * rows, 14)
        arguments = (x, torch.zeros(32), torch.ones(1))
        with torch.no_grad():
            assert 1e-5 < error(run(*arguments), small(*arguments)) < 0.05
    assert len(compiled_graphs(small)) == 1


class InEightBits(torch.nn.Module):
    def forward(self, q: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.ditopt.block_sparse_attention_8bit.default(
            q, q, q, counts, ids, 16, 16, 0.25, False
        )


@pytest.mark.parametrize(
    ("exporter", "message"),
    [
        (AotiExporter(), "block_sparse_attention_8bit.default needs ditopt's library"),
        (OnnxExporter(), "block_sparse_attention_8bit.default has no counterpart in ONNX"),
    ],
    ids=["pt2", "onnx"],
)
def test_engines_refuse_the_operator_by_name(exporter: Any, message: str, tmp_path: Any) -> None:
    lists = from_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    found = []

    def backend(gm: Any, examples: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(InEightBits(), backend=backend)(torch.randn(1, 2, 32, 16), *lists)
    with pytest.raises(EngineError, match=message) as caught:
        exporter.export(found[0], tmp_path / "x", {})
    assert "plan" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_runs_from_a_plan(kind: str) -> None:
    """On Hopper the plan's choice is the kernel, as close to dense as its reference."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(256, 768)])

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.blocks[0](x).unflatten(-1, (3, 2, 128)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    torch.manual_seed(0)
    model = Attention().eval().requires_grad_(False).to("cuda", torch.bfloat16)
    x = torch.randn(1, 1000, 256, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    plain = torch.compile(model, backend="ditopt_eager")
    expected = plain(x)
    (site,) = compiled_graphs(model)[-1].attention
    made = document(model, arithmetic={site.id: {"kind": kind}})
    record = {"id": site.id, "kind": "self", "heads": 2, "head_dim": 128}
    made["model"] |= {"sites": [record], "weights": fingerprint.weights(model)}
    made |= {"layout": None, "block": {"q": 128, "k": 128}, "sampler": {"calls": 1}}
    out = compiled(model, plan(made))(x)
    assert decisions(model) == [
        (site.id, True, f"{kind} on every block, blocks of 128 x 128 tokens")
    ]
    assert 1e-4 < error(out.float(), expected.float()) < 0.1
    assert ops_8bit.reason_to_decline(x[:, None, :, :128], 128, 128) is None
