"""Selectors in plans: schema, refusals, and a compiled model that chooses its blocks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt import fingerprint
from ditopt.errors import PlanError
from ditopt.patterns import Band, PooledTopK, PooledTopP, Window
from ditopt.plan import Plan
from ditopt.plan.schema import remainder_tensor
from ditopt.torch_backend import compiled_graphs

GRID = {"frames": 1, "height": 8, "width": 16, "text_before": 0, "text_after": 0}
SITES = [f"blocks.{k}#0" for k in range(2)]
SELECTOR = {"kind": "pooled_top_k", "density": 0.4}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    """An image model: a patch embedding of 8 x 16 tokens, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 32, 2, stride=2), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, latent: Tensor) -> Tensor:
        x = self.embed(latent).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def document(model: nn.Module | None = None, **selectors: Any) -> dict[str, Any]:
    own = model is not None
    return {
        "ditopt_plan": 1,
        "model": {
            "architecture": fingerprint.architecture(model) if own else "a" * 64,
            "weights": fingerprint.weights(model) if own else "b" * 64,
            "name": "Model",
            "sites": [{"id": s, "kind": "self", "heads": 2, "head_dim": 16} for s in SITES],
        },
        "sampler": {"calls": 2},
        "hardware": {"device": "cpu", "name": "a CPU", "torch": "2.13.0", "threads": 2},
        "layout": GRID,
        "block": {"q": 16, "k": 16},
        "phases": [{"calls": [0, 2], "selectors": selectors or dict.fromkeys(SITES, SELECTOR)}],
    }


def plan(**changes: Any) -> Plan:
    return Plan.from_text(json.dumps({**document(), **changes}))


def test_a_plan_with_selectors_survives_a_round_trip() -> None:
    made = plan()
    assert made.phases[0].selectors == dict.fromkeys(SITES, PooledTopK(density=0.4))
    assert made.phases[0].selectors[SITES[0]].keep == Band(window=0)
    assert Plan.from_text(made.to_text()) == made


def test_a_selector_may_keep_a_static_pattern() -> None:
    keep = {"kind": "window", "frames": 1, "rows": 3, "cols": 3}
    selector = {"kind": "pooled_top_p", "mass": 0.9, "minimum": 2, "keep": keep}
    made = Plan.from_text(json.dumps(document(**{SITES[0]: selector})))
    assert made.phases[0].selectors[SITES[0]] == PooledTopP(
        mass=0.9, minimum=2, keep=Window(frames=1, rows=3, cols=3)
    )


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"kind": "pooled_top_k"}, "density: missing"),
        ({"kind": "pooled_top_k", "density": 0}, "density: input should be greater than 0"),
        ({"kind": "pooled_top_p", "mass": 1.5}, "mass: input should be less than or equal to 1"),
        ({"kind": "pooled_top_k", "density": 0.5, "mass": 1.0}, "mass: unknown key"),
        ({"kind": "magic"}, "does not match any of the expected tags"),
    ],
)
def test_bad_selectors_are_refused_by_field(selector: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_text(json.dumps(document(**{SITES[0]: selector})))


def test_a_selector_needs_a_known_site_a_grid_and_no_patterns_beside_it() -> None:
    with pytest.raises(PlanError, match=r"selectors\['blocks.9#0'\]: no such site"):
        Plan.from_text(json.dumps(document(**{"blocks.9#0": SELECTOR})))
    with pytest.raises(PlanError, match="needs `layout`, which is null"):
        plan(layout=None)
    both = {"attention": {SITES[0]: [{"kind": "dense"}] * 2}, "selectors": {SITES[0]: SELECTOR}}
    with pytest.raises(PlanError, match="stands in `attention` too"):
        plan(phases=[{"calls": [0, 2], **both}])


def test_cross_attention_takes_no_selector() -> None:
    made = document()
    made["model"]["sites"][1]["kind"] = "cross"
    with pytest.raises(PlanError, match="cross-attention takes no selector"):
        Plan.from_text(json.dumps(made))


def compiled(model: nn.Module, path: Path, document: dict[str, Any], backend: str) -> Any:
    Plan.from_text(json.dumps(document)).save(path)
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, options={"plan": str(path)})


@pytest.mark.parametrize(
    "backend", ["ditopt_eager", pytest.param("ditopt", marks=pytest.mark.slow)]
)
def test_a_compiled_model_chooses_its_blocks(tmp_path: Path, backend: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    latents = torch.randn(2, 1, 3, 16, 32)
    everything = {site: {"kind": "pooled_top_k", "density": 1.0} for site in SITES}
    for selectors, exact in ((everything, True), ({}, False)):
        model = copy.deepcopy(model)
        run = compiled(model, tmp_path / "plan.yaml", document(model, **selectors), backend)
        with torch.no_grad():
            for latent in latents:
                out, dense = run(latent), model(latent)
                close = torch.allclose(out, dense, atol=1e-5)
                assert close == exact
        (record,) = compiled_graphs(model)
        decisions = [d for d in record.decisions if d.rule == "select_blocks_online"]
        assert [d.site for d in decisions] == SITES
        assert all(d.applied for d in decisions)


def test_a_remainder_needs_blocks_that_are_left_out() -> None:
    phase = {"calls": [0, 2], "remainders": {SITES[0]: {"kind": "linear"}}}
    with pytest.raises(PlanError, match="the site leaves nothing out"):
        plan(phases=[phase])


def test_a_linear_remainder_reads_its_projection_from_the_side_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    latent = torch.randn(1, 3, 16, 32)
    wanted = document(model)
    results = []
    projections = torch.randn(2, 16, 16)
    for remainders, tensors in (
        ({}, {}),
        (SITES, {remainder_tensor(site): torch.zeros(2, 16, 16) for site in SITES}),
        (SITES, {remainder_tensor(site): projections.clone() for site in SITES}),
        (SITES[:1], {"something": torch.zeros(1)}),
    ):
        wanted["phases"][0]["remainders"] = {site: {"kind": "linear"} for site in remainders}
        path = tmp_path / "plan.yaml"
        Plan.from_text(json.dumps(wanted)).with_tensors(tensors).save(path)
        torch._dynamo.reset()
        fresh = copy.deepcopy(model)
        run = torch.compile(fresh, backend="ditopt_eager", options={"plan": str(path)})
        with torch.no_grad():
            results.append(run(latent))
        (record,) = compiled_graphs(fresh)
    sparse, zeros, projected, _ = results
    assert torch.equal(sparse, zeros)
    assert not torch.allclose(sparse, projected, atol=1e-3)
    reasons = [d.reason for d in record.decisions if d.site == SITES[0] and not d.applied]
    assert "the plan's side file lacks 'remainder/blocks.0#0'" in reasons


def test_a_compiled_model_searches_its_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    latent = torch.randn(1, 3, 16, 32)
    search = {"kind": "hierarchical", "top_k": 8, "coarse": False}  # all of the 8 blocks
    wanted = document(model, **dict.fromkeys(SITES, search))
    run = compiled(model, tmp_path / "plan.yaml", wanted, "ditopt_eager")
    with torch.no_grad():
        torch.testing.assert_close(run(latent), model(latent), rtol=0, atol=1e-5)
    (record,) = compiled_graphs(model)
    decisions = [d for d in record.decisions if d.rule == "search_hierarchically"]
    assert [(d.site, d.reason) for d in decisions] == [
        (site, "best 8 blocks at each of 1 levels") for site in SITES
    ]
