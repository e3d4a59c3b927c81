"""What plans say about attention beyond patterns and pooled scores, on a compiled video model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt import fingerprint
from ditopt.errors import PlanError
from ditopt.kernels.block_selection import ops_kept
from ditopt.patterns import Clusters, ExactTopK, PooledPercentile, TwoMasks
from ditopt.plan import Plan
from ditopt.runtime import stats
from ditopt.torch_backend import compiled_graphs

GRID = (3, 5, 7)  # odd on purpose: 105 tokens, blocks of 16, the last with 9
SITES = [f"blocks.{k}#0" for k in range(2)]
BAND = {"kind": "band", "window": 10}
PATTERNS = {site: [BAND, {"kind": "skip"}] for site in SITES}
MEANS = {site: {"kind": "mean"} for site in SITES}
SELECTORS: dict[str, dict[str, Any]] = {
    "exact_top_k": {"kind": "exact_top_k", "density": 0.4},
    "adaptive": {"kind": "exact_top_k", "density": 0.4, "adaptive": True},
    "exact_top_p": {"kind": "exact_top_p", "mass": 0.8},
    "pooled_percentile": {"kind": "pooled_percentile", "density": 0.4},
    "pooled, kept": {"kind": "pooled_top_k", "density": 0.4, "refresh": 2},
    "clusters": {"kind": "clusters", "queries": 6, "keys": 8, "mass": 0.6, "first": 4},
    "two_masks": {"kind": "two_masks", "pattern": BAND, "samples": 16},
}
EVERYTHING: dict[str, dict[str, Any]] = {
    "exact_top_k": {"kind": "exact_top_k", "density": 1.0},
    "clusters": {"kind": "clusters", "queries": 6, "keys": 8, "mass": 1.0, "first": 4},
    "two_masks": {"kind": "two_masks", "pattern": {"kind": "dense"}},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            3 * layer(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    """A video model: a patch embedding of 3 x 5 x 7 tokens, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv3d(3, 32, (1, 2, 2), stride=(1, 2, 2)), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, latent: Tensor, prompt: Tensor, t: Tensor) -> Tensor:
        x = self.embed(latent).flatten(2).transpose(1, 2) + prompt + t
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def latent(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2], generator=generator)


def document(model: nn.Module, calls: int = 1, **phase: Any) -> dict[str, Any]:
    names = ("frames", "height", "width")
    return {
        "ditopt_plan": 1,
        "model": {
            "architecture": fingerprint.architecture(model),
            "weights": fingerprint.weights(model),
            "name": "Model",
            "sites": [{"id": s, "kind": "self", "heads": 2, "head_dim": 16} for s in SITES],
        },
        "sampler": {
            "calls": calls,
            "timestep": "t",
            "timesteps": [1.0 - k / calls for k in range(calls)],
            "varying": ["latent", "t"],
        },
        "hardware": {"device": "cpu", "name": "a CPU", "torch": "2.13.0", "threads": 2},
        "layout": {**dict(zip(names, GRID, strict=True)), "text_before": 0, "text_after": 0},
        "block": {"q": 16, "k": 16},
        "phases": [{"calls": [0, calls], **phase}],
    }


def plan(document: dict[str, Any]) -> Plan:
    return Plan.from_text(json.dumps(document))


def compiled(model: nn.Module, made: Plan, backend: str = "ditopt_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, options={"plan": made})


def once(model: nn.Module, backend: str = "ditopt_eager", **phase: Any) -> Tensor:
    with torch.no_grad():
        run = compiled(model, plan(document(model, **phase)), backend)
        out: Tensor = run(latent(), torch.zeros(32), torch.ones(1))
    return out


def dense(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(latent(), torch.zeros(32), torch.ones(1))
    return out


def error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def test_plans_with_selectors_survive_a_round_trip(model: Model) -> None:
    made = plan(document(model, selectors={SITES[0]: SELECTORS["adaptive"]}))
    assert made.phases[0].selectors[SITES[0]] == ExactTopK(density=0.4, adaptive=True)
    assert Plan.from_text(made.to_text()) == made
    for name, kind in (
        ("clusters", Clusters),
        ("two_masks", TwoMasks),
        ("pooled_percentile", PooledPercentile),
    ):
        made = plan(document(model, selectors={SITES[0]: SELECTORS[name]}))
        assert isinstance(made.phases[0].selectors[SITES[0]], kind)
        assert Plan.from_text(made.to_text()) == made


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"kind": "exact_top_k"}, "density: missing"),
        ({"kind": "exact_top_p", "mass": 0}, "mass: input should be greater than 0"),
        ({"kind": "pooled_top_k", "density": 0.5, "refresh": 0}, "refresh: input should be"),
        ({"kind": "clusters", "keys": 0}, "keys: input should be greater than or equal to 1"),
        ({"kind": "two_masks"}, "pattern: missing"),
        ({"kind": "two_masks", "pattern": BAND, "keep": BAND}, "keep: unknown key"),
    ],
)
def test_bad_selectors_are_refused_by_field(
    model: Model, selector: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan(document(model, selectors={SITES[0]: selector}))


@pytest.mark.parametrize("name", ["clusters", "two_masks"])
def test_selectors_of_orders_need_the_raster(model: Model, name: str) -> None:
    wanted = document(model, selectors={SITES[0]: SELECTORS[name]})
    wanted["order"] = {"kind": "morton"}
    message = f"'{name}' chooses an order of tokens for each head; `order` must be null, got 'mort"
    with pytest.raises(PlanError, match=message):
        plan(wanted)


def test_a_remainder_states_its_kind(model: Model) -> None:
    attention = {SITES[0]: [BAND, BAND]}
    with pytest.raises(PlanError, match=r"remainders.*does not match any of the expected tags"):
        plan(document(model, attention=attention, remainders={SITES[0]: {"kind": "median"}}))


@pytest.mark.parametrize("name", list(EVERYTHING))
def test_selectors_that_keep_everything_are_dense_attention(model: Model, name: str) -> None:
    out = once(model, selectors=dict.fromkeys(SITES, EVERYTHING[name]))
    assert error(out, dense(model)) < 1e-5
    (record,) = compiled_graphs(model)
    rule = "select_head_orders" if name in ("clusters", "two_masks") else "select_blocks_online"
    assert [d.site for d in record.decisions if d.rule == rule and d.applied] == SITES
    assert stats(model)["kernels"]["block_sparse_attention"] == len(SITES)


@pytest.mark.parametrize("name", ["adaptive", "pooled_percentile", "clusters", "two_masks"])
def test_selectors_approximate_and_means_help(model: Model, name: str) -> None:
    wanted = dict.fromkeys(SITES, SELECTORS[name])
    expected = dense(model)
    dropped = once(model, selectors=wanted)
    means = once(model, selectors=wanted, remainders=MEANS)
    assert 0 < error(means, expected) < error(dropped, expected) < 1


def test_means_stand_for_what_patterns_leave_out(model: Model) -> None:
    expected = dense(model)
    dropped = once(model, attention=PATTERNS)
    means = once(model, attention=PATTERNS, remainders=MEANS)
    assert 0 < error(means, expected) < 0.8 * error(dropped, expected)
    record = compiled_graphs(model)[-1]
    told = {d.rule: d.reason for d in record.decisions if d.site == SITES[0]}
    assert told["substitute_means"] == (
        "the mean of each key block stands for it where it is left out"
    )
    assert "means of left-out blocks need ditopt's kernels" in told["attention_executor"]


def test_dense_heads_leave_nothing_for_means(model: Model) -> None:
    everything = {site: [{"kind": "dense"}] * 2 for site in SITES}
    out = once(model, attention=everything, remainders=MEANS)
    assert error(out, dense(model)) < 1e-5
    rules = {d.rule for d in compiled_graphs(model)[-1].decisions}
    assert "substitute_means" not in rules


def test_means_in_an_order_of_tokens(model: Model) -> None:
    window = {"kind": "window", "frames": 2, "rows": 3, "cols": 3}
    wanted = document(
        model,
        attention=dict.fromkeys(SITES, [window] * 2),
        remainders=MEANS,
    )
    wanted["order"] = {"kind": "tile", "frames": 2, "rows": 2, "cols": 4}
    expected = dense(model)
    with torch.no_grad():
        out = compiled(model, plan(wanted))(latent(), torch.zeros(32), torch.ones(1))
        dropped = {**wanted, "phases": [{**wanted["phases"][0], "remainders": {}}]}
        without = compiled(model, plan(dropped))(latent(), torch.zeros(32), torch.ones(1))
    assert 0 < error(out, expected) < error(without, expected)


@pytest.mark.parametrize(
    "phase",
    [
        {"attention": PATTERNS, "remainders": MEANS},
        pytest.param(
            {"selectors": dict.fromkeys(SITES, SELECTORS["two_masks"])}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"selectors": dict.fromkeys(SITES, SELECTORS["adaptive"]), "remainders": MEANS},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"selectors": dict.fromkeys(SITES, SELECTORS["clusters"])}, marks=pytest.mark.slow
        ),
    ],
    ids=["patterns", "two_masks", "exact mass", "clusters"],
)
def test_one_program_serves_several_resolutions(model: Model, phase: dict[str, Any]) -> None:
    made = plan(document(model, **phase))
    latents = [torch.randn(1, 3, f, h, w) for f, h, w in ((3, 10, 14), (2, 14, 18), (4, 6, 10))]
    rest = (torch.zeros(32), torch.ones(1))
    with torch.no_grad():
        run = compiled(model, made)
        outs = [run(x, *rest) for x in latents]
        graphs = len(compiled_graphs(model))
        for x, out in zip(latents, outs, strict=True):
            assert error(out, compiled(model, made)(x, *rest)) < 1e-5
    assert graphs == 2  # the first resolution, and all others


@pytest.mark.parametrize(
    ("refresh", "phases", "searched"),
    [
        (1, [[0, 6]], [0, 1, 2, 3, 4, 5]),
        (4, [[0, 6]], [0, 4]),
        (100, [[0, 1], [1, 4], [4, 6]], [0, 1, 4]),
    ],
)
def test_lists_serve_computed_calls_of_one_branch_and_phase(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    refresh: int,
    phases: list[list[int]],
    searched: list[int],
) -> None:
    selector = {**SELECTORS["exact_top_k"], "refresh": refresh}
    wanted = document(model, calls=6)
    wanted["phases"] = [{"calls": c, "selectors": {SITES[0]: selector}} for c in phases]
    made: list[int] = []
    choose = ops_kept._by_mass

    def counting(*args: Any) -> Any:
        made.append(call)
        return choose(*args)

    monkeypatch.setattr(ops_kept, "_by_mass", counting)
    run = compiled(model, plan(wanted))
    prompt = torch.zeros(32)
    for _ in range(2):  # a second run starts anew
        made.clear()
        with torch.no_grad():
            for call in range(6):
                run(latent(call), prompt, torch.tensor([1.0 - call / 6]))
        assert made == searched


def test_skipped_calls_do_not_age_a_choice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = document(model, calls=6)
    selector = {**SELECTORS["exact_top_k"], "refresh": 2}
    wanted["phases"] = [{"calls": [0, 6], "selectors": {SITES[0]: selector}}]
    skipped = {str(call): [1.0] for call in (1, 2, 4)}
    wanted["cache"] = {"full": [0, 3, 5], "history": 1, "coefficients": skipped}
    made: list[int] = []
    choose = ops_kept._by_mass

    def counting(*args: Any) -> Any:
        made.append(call)
        return choose(*args)

    monkeypatch.setattr(ops_kept, "_by_mass", counting)
    run, prompt = compiled(model, plan(wanted)), torch.zeros(32)
    with torch.no_grad():
        for call in range(6):
            run(latent(call), prompt, torch.tensor([1.0 - call / 6]))
    assert made == [0, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SELECTORS))
def test_inductor_gives_what_eager_gives(model: Model, name: str) -> None:
    phase = {
        "selectors": dict.fromkeys(SITES, SELECTORS[name]),
        "remainders": MEANS,
    }
    assert error(once(model, "ditopt", **phase), once(model, **phase)) < 1e-5


@pytest.mark.slow
def test_inductor_gives_what_eager_gives_for_patterns_with_means(model: Model) -> None:
    phase = {
        "attention": PATTERNS,
        "remainders": MEANS,
    }
    assert error(once(model, "ditopt", **phase), once(model, **phase)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(SELECTORS))
def test_a_gpu_gives_what_the_cpu_gives(model: Model, name: str) -> None:
    phase = {"selectors": dict.fromkeys(SITES, SELECTORS[name]), "remainders": MEANS}
    expected = once(model, **phase)
    made = plan(document(model, **phase))
    with torch.no_grad():
        out = compiled(model.cuda(), made, "ditopt")(
            latent().cuda(), torch.zeros(32).cuda(), torch.ones(1).cuda()
        )
    # Blocks whose scores are nearly equal may be chosen differently.
    assert error(out.cpu(), expected) < 0.05
