"""What does not depend on the latents is computed once, and results stay the same to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import ditopt
from ditopt import hoist_groups, torch_backend
from ditopt.backends.eager import EagerBackend
from ditopt.capture import Captured, capture
from ditopt.config import Options
from ditopt.dependence import find_dependence
from ditopt.graph import fake_value
from ditopt.hoist import hoist, varying_inputs
from ditopt.hoist_rewrite import Hoisted
from ditopt.hoist_select import is_heavy
from ditopt.part_maker import Phase
from ditopt.program import ProgramBuilder
from ditopt.runtime import InputRoles
from ditopt.sites import find_sites
from ditopt.stack import find_stack
from ditopt.torch_backend import compiled_graphs

DIM, TEXT, TOKENS = 8, 12, 16


class Block(nn.Module):
    """Self-attention and cross-attention with a modulation, as in Wan and PixArt."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.q2, self.k2, self.v2 = (nn.Linear(DIM, DIM) for _ in range(6))
        self.norm_k = nn.RMSNorm(DIM)
        self.modulate = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.modulate(nn.functional.silu(temb)).chunk(2, -1)
        h = nn.functional.layer_norm(x, (DIM,)) * (1 + scale) + shift
        x = x + scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        k, v = self.norm_k(self.k2(text)), self.v2(text)
        return x + scaled_dot_product_attention(self.q2(x), k, v)


class Denoiser(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, DIM), nn.Linear(DIM, 4)
        self.text = nn.Sequential(nn.Linear(6, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.time = nn.Sequential(nn.Linear(8, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.register_buffer("frequencies", torch.arange(1.0, 5.0))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        angles = timestep[:, None].float() * self.frequencies
        temb = self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, None]
        text = self.text(prompt)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, text, temb)
        return self.out(x)


def x(seed: int = 0) -> Tensor:
    return torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int = 0) -> Tensor:
    return torch.randn(1, TEXT, 6, generator=torch.Generator().manual_seed(100 + seed))


def timestep(value: float) -> Tensor:
    return torch.tensor([value])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Without fused projections, so that eager is matched to the bit."""
    torch._dynamo.reset()
    options = {"fuse_projections": False, **options}
    return torch.compile(model, backend="ditopt_eager", options=options)


class Linears(TorchDispatchMode):
    """Counts matrix products by their number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.rows[args[-2].shape[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Matrix products that compiled programs have run, by their number of rows."""
    linears = Linears()

    def lower(self: EagerBackend, gm: torch.fx.GraphModule, options: Any) -> Any:
        def run(*arguments: Any) -> Any:
            with linears:  # not around the compiled model: Dynamo would leave it alone
                return gm(*arguments)

        return run

    monkeypatch.setattr(EagerBackend, "lower", lower)
    return linears.rows


def captured(model: nn.Module, *arguments: Any) -> Captured:
    found: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(capture(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*arguments)
    return found[0]


def hoisted(model: nn.Module, *arguments: Any) -> Hoisted:
    graph = captured(model, *arguments)
    return hoist(graph, None, varying_inputs(graph))


def test_each_node_depends_on_what_reaches_it(model: nn.Module) -> None:
    graph = captured(model, x(), timestep(3), prompt())
    names = {1 << slot: name for name, slot in graph.user_inputs.items()}
    dependence = find_dependence(graph)
    found: Counter[str] = Counter()
    for piece in graph.pieces:
        for node, mask in dependence.nodes[piece.body.key].items():
            if is_heavy(node):
                found["+".join(names[bit] for bit in names if bit & mask)] += 1
    everything = "+".join(names.values())
    assert found == {"x": 1, "timestep": 2 + 3, "prompt": 2 + 3 * 2, everything: 3 * 6 + 1}


def test_the_latents_are_told_by_their_shape(model: nn.Module) -> None:
    graph = captured(model, x(), timestep(3), prompt())
    assert [graph.inputs[slot].name for slot in varying_inputs(graph)] == ["x"]


def test_groups_hold_what_depends_on_the_same_inputs(model: nn.Module) -> None:
    result = hoisted(model, x(), timestep(3), prompt())
    assert {group.name: len(group.pieces) for group in result.groups} == {
        "timestep": 1 + 3,
        "prompt": 1 + 3,
    }
    heavy = Counter(
        group.name
        for group in result.groups
        for _, piece in group.pieces
        for node in piece.body.gm.graph.nodes
        if is_heavy(node)
    )
    assert heavy == {"timestep": 5, "prompt": 8}
    assert all(decision.applied for decision in result.decisions)
    (told,) = (d.reason for d in result.decisions if "prompt" in d.reason)
    megabytes = 3 * 2 * TEXT * DIM * 4 / 1e6
    assert told == (
        "6 values of 4 parts depend on prompt only: computed once and kept, "
        f"{megabytes:.1f} MB for each set of inputs"
    )


def test_equal_blocks_go_on_sharing_their_bodies(model: nn.Module) -> None:
    result = hoisted(model, x(), timestep(3), prompt())
    blocks = [piece.body.key for piece in result.captured.pieces if piece.kind == "block"]
    assert len(set(blocks)) == 1
    for group in result.groups:
        assert len({p.body.key for _, p in group.pieces if p.kind == "block"}) == 1


def test_elementwise_work_stays_where_it_is_fused(model: nn.Module) -> None:
    """Of a modulation the matrix product leaves; `1 + scale` and the chunks stay."""
    result = hoisted(model, x(), timestep(3), prompt())
    block = next(piece for piece in result.captured.pieces if piece.kind == "block")
    sizes = [tuple(item.fake.shape) for item in result.captured.inputs if item.role == "hoisted"]
    assert sizes.count((1, 1, 2 * DIM)) == 3
    assert any("split" in node.name or "chunk" in node.name for node in block.body.gm.graph.nodes)


@pytest.mark.parametrize("blocks", [1, 3])
def test_text_is_projected_once_per_request(blocks: int, rows: Counter[int]) -> None:
    model = Denoiser(blocks).eval().requires_grad_(False)
    run = compiled(model)
    with torch.no_grad():
        run(x(), timestep(9), prompt())
    for request in (1, 2):
        text = prompt(request)
        rows.clear()
        with torch.no_grad():
            results = [run(x(step), timestep(step), text) for step in range(4)]
        assert rows[TEXT] == 2 + 2 * blocks
        assert rows[TOKENS] == 4 * (2 + 4 * blocks)
        for step, result in enumerate(results):
            assert torch.equal(result, model(x(step), timestep(step), text))


def test_two_guidance_branches_and_a_repeated_schedule(
    model: nn.Module, rows: Counter[int]
) -> None:
    run, branches = compiled(model), [prompt(1), prompt(2)]
    with torch.no_grad():
        run(x(), timestep(9), prompt())
    for repetition in range(2):
        rows.clear()
        with torch.no_grad():
            for step in range(3):
                for text in branches:
                    run(x(step), timestep(step), text)
        first = repetition == 0
        assert rows[TEXT] == (2 * 8 if first else 0)
        assert rows[1] == (3 * 5 if first else 0)  # once per timestep, for both branches
    kernels = ditopt.stats(model)["kernels"]
    assert kernels == {"hoisted.computed": 2 + 3 + 2, "hoisted.reused": 12 - 5 + 12}


CHANGES: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "nothing": lambda model, now: None,
    "other prompt": lambda model, now: now.update(prompt=prompt(7)),
    "prompt in place": lambda model, now: now["prompt"].mul_(1.5),
    "prompt through a view": lambda model, now: now["prompt"][0, 3].zero_(),
    "prompt data": lambda model, now: setattr(now["prompt"], "data", prompt(8)),
    "back to the first prompt": lambda model, now: now.update(prompt=now["first"]),
    "timestep": lambda model, now: now.update(timestep=now["timestep"] - 3),
    "timestep in place": lambda model, now: now["timestep"].add_(1),
    "latents": lambda model, now: now.update(x=now["x"] * 0.9),
    "text weight": lambda model, now: model.text[0].weight.mul_(1.1),
    "block weight": lambda model, now: model.blocks[1].v2.weight.add_(0.1),
    "norm weight": lambda model, now: model.blocks[2].norm_k.weight.mul_(0.9),
    "reload": lambda model, now: model.load_state_dict(Denoiser().state_dict()),
    "weight data": lambda model, now: setattr(
        model.blocks[0].k2.weight, "data", model.blocks[0].k2.weight * 1.2
    ),
    "silent": lambda model, now: (model.time[0].weight.data.add_(0.1), ditopt.invalidate(model)),
}


@pytest.fixture(scope="module")
def prepared() -> tuple[nn.Module, Callable[..., Any]]:
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    return model, compiled(model)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=12))
def test_whatever_changes_results_are_those_of_eager(
    prepared: tuple[nn.Module, Callable[..., Any]], changes: list[str]
) -> None:
    model, run = prepared
    now = {"x": x(), "timestep": timestep(50), "prompt": prompt()}
    now["first"] = now["prompt"]
    with torch.no_grad():
        for change in ["nothing", *changes]:
            CHANGES[change](model, now)
            arguments = (now["x"], now["timestep"], now["prompt"])
            assert torch.equal(run(*arguments), model(*arguments)), change


def test_a_lora_that_is_merged_in_place_is_noticed(model: nn.Module) -> None:
    run, text = compiled(model), prompt()
    with torch.no_grad():
        run(x(), timestep(1), text)
        for block in model.blocks:
            block.k2.weight.add_(torch.randn(DIM, 2) @ torch.randn(2, DIM))
        assert torch.equal(run(x(), timestep(1), text), model(x(), timestep(1), text))


class Returns(nn.Module):
    """Gives back what depends on the prompt only, as it is and as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.embed = nn.Linear(6, DIM), nn.Linear(4, DIM)

    def forward(self, x: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text = self.text(prompt)
        h = self.embed(x)
        out = scaled_dot_product_attention(h, text, text)
        return linear(out, self.embed.weight.T), text, text.flatten()


def test_the_caller_may_write_into_what_it_gets() -> None:
    model = Returns().eval().requires_grad_(False)
    run, text = compiled(model), prompt()
    with torch.no_grad():
        for _ in range(3):
            results = run(x(), text)
            for got, wanted in zip(results, model(x(), text), strict=True):
                assert torch.equal(got, wanted)
                assert got.stride() == wanted.stride()
                got.zero_()
    assert ditopt.stats(model)["kernels"] == {"hoisted.computed": 1, "hoisted.reused": 2}


def test_random_numbers_are_drawn_anew(model: nn.Module) -> None:
    class Noisy(Denoiser):
        def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return super().forward(x, timestep, prompt + torch.rand_like(prompt))

    noisy = Noisy().eval().requires_grad_(False)
    run, text = compiled(noisy), prompt()
    with torch.no_grad():
        first, second = run(x(), timestep(1), text), run(x(), timestep(1), text)
    assert not torch.equal(first, second)
    (told,) = {d.reason for d in compiled_graphs(noisy)[-1].decisions if d.rule == "hoist"}
    assert "depend on timestep only" in told


def test_other_sizes_of_one_graph(model: nn.Module) -> None:
    run = compiled(model)
    for tokens, words in ((TOKENS, TEXT), (9, 7), (TOKENS, 7), (9, 20), (TOKENS, TEXT)):
        latents, text = torch.randn(1, tokens, 4), torch.randn(1, words, 6)
        with torch.no_grad():
            for step in (5, 4):
                got = run(latents, timestep(step), text)
                torch.testing.assert_close(got, model(latents, timestep(step), text))
    assert len(compiled_graphs(model)) <= 3


def test_inference_tensors_outside_a_session_are_computed_each_time(model: nn.Module) -> None:
    run = compiled(model)
    with torch.inference_mode():
        text = prompt()
        for step in range(3):
            run(x(), timestep(step), text)
        reasons = [d.reason for d in compiled_graphs(model)[-1].decisions if d.rule == "hoist"]
        assert (
            "inference tensors carry no counter of changes: kept inside a session only" in reasons
        )
        before = ditopt.stats(model)["kernels"]["hoisted.computed"]
        with ditopt.session("request"):
            for step in range(3):
                got = run(x(), timestep(step), text)
                assert torch.equal(got, model(x(), timestep(step), text))
    assert ditopt.stats(model)["kernels"]["hoisted.computed"] == before + 1


def test_switched_off(model: nn.Module) -> None:
    run = compiled(model, hoist=False)
    with torch.no_grad():
        run(x(), timestep(1), prompt())
    assert not [d for d in compiled_graphs(model)[-1].decisions if d.rule == "hoist"]
    assert ditopt.stats(model)["kernels"] == {}


def test_a_model_whose_latents_are_unknown_is_left_alone() -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
            return (self.one(x).mean() * self.two(prompt).mean()).reshape(1)

    model = Score().eval()
    run = compiled(model, strict=True)
    with torch.no_grad():
        assert torch.equal(run(x(), prompt()), model(x(), prompt()))
    (decision,) = (d for d in compiled_graphs(model)[-1].decisions if d.rule == "hoist")
    assert (decision.applied, decision.reason) == (
        False,
        "which input holds the latents is unknown: none has the shape of a result",
    )


def test_masks_that_each_block_makes_anew_are_not_kept_if_they_are_large(model: nn.Module) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for one, two in zip(self.blocks, self.more, strict=True):
                both = (mask[:, :, None] * mask[:, None, :]).bool()
                x = x + two(scaled_dot_product_attention(one(x), x, x, both))
            return x

    arguments = (torch.randn(1, 300, 4), torch.ones(1, 300))
    assert [g.name for g in hoisted(Masked().eval(), *arguments).groups] == ["mask"]
    with mock.patch.object(hoist_groups, "MAX_LIGHT_BYTES", 100_000):
        assert hoisted(Masked().eval(), *arguments).groups == ()


def test_a_skipped_step_does_not_compute_what_only_the_stack_reads(
    model: nn.Module, rows: Counter[int]
) -> None:
    graph = captured(model, x(), timestep(3), prompt())
    stack = find_stack(graph)
    assert not isinstance(stack, str)
    builder = ProgramBuilder(
        graph, find_sites(graph)[0], EagerBackend(), Options(), torch.device("cpu")
    )
    programs = builder.build([Phase()], stack, InputRoles(), varying_inputs(graph))
    values = dict(zip(("x", "timestep", "prompt"), (x(), timestep(3), prompt()), strict=True))
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = [
        values[item.name] if item.role == "user" else parameters[item.name] for item in graph.inputs
    ]
    programs.bind(inputs, None)
    assert (rows[TEXT], rows[1]) == (2, 2)
    bound = programs.bind(inputs, 0)
    assert (rows[TEXT], rows[1]) == (2 + 3, 2 + 3)  # k and v of a block are one product
    with torch.no_grad():
        carry, rest = programs.head(bound)
        (result,) = programs.tail(bound, programs.body(bound, carry, rest, 0), rest)
    torch.testing.assert_close(result, model(*values.values()))


def test_a_part_of_a_model_is_left_alone(model: nn.Module) -> None:
    class Broken(Denoiser):
        def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            x = x * self.text(prompt).mean()
            torch._dynamo.graph_break()
            return super().forward(x, timestep, prompt)

    broken = Broken().eval().requires_grad_(False)
    run = compiled(broken)
    with torch.no_grad():
        assert torch.equal(run(x(), timestep(1), prompt()), broken(x(), timestep(1), prompt()))
    first = torch_backend.compiled_graphs(broken)[0]
    assert [d.reason for d in first.decisions if d.rule == "hoist"] == [
        "the graph is a part of the model, so its inputs are new in each call"
    ]


def test_hoisted_values_have_the_types_that_their_readers_were_captured_with(
    model: nn.Module,
) -> None:
    result = hoisted(model, x(), timestep(3), prompt())
    fakes = {s: item.fake for s, item in enumerate(result.captured.inputs)}
    for piece in result.captured.pieces:
        for slot, node in zip(
            piece.inputs, piece.body.gm.graph.find_nodes(op="placeholder"), strict=True
        ):
            if slot in fakes:
                assert fake_value(node).stride() == fakes[slot].stride()
                assert fake_value(node).dtype == fakes[slot].dtype
