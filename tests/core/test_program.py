"""From pieces to programs, with a backend that counts what it lowers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.capture import Captured, capture
from ditopt.config import Options
from ditopt.infer_layout import SiteGeometry
from ditopt.kernels.block_sparse_attention import dispatch
from ditopt.part_maker import Phase
from ditopt.patterns import Band, Dense, Skip
from ditopt.program import ProgramBuilder
from ditopt.runtime import InputRoles, Programs
from ditopt.site_inputs import HeadChoice
from ditopt.sites import AttentionSite, find_sites
from ditopt.stack import find_stack

GRID = (1, 4, 8)
X = torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(0))
NO_ROLES = InputRoles.from_names([], timestep=None, varying=())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counting:
    """Runs graphs as they are, and keeps what it lowered."""

    name = "counting"

    def __init__(self, *, fuses: bool) -> None:
        self.fuses = fuses
        self.lowered: list[fx.GraphModule] = []

    def available(self) -> None:
        return None

    def supports(self, node: fx.Node) -> None:
        return None

    def lower(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> Callable[..., Any]:
        self.lowered.append(gm)
        return gm.forward


class Built:
    """A captured model with its sites, and programs made from it."""

    def __init__(self, blocks: int = 6, *, fuses: bool = False) -> None:
        torch.manual_seed(0)
        self.model = Model(blocks).eval()
        self.backend = Counting(fuses=fuses)
        found: list[tuple[Captured, list[Any], list[AttentionSite]]] = []

        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            captured = capture(gm)
            found.append((captured, list(inputs), find_sites(captured)[0]))
            return gm.forward

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(self.model, backend=backend)(X)
        ((self.captured, self.inputs, self.sites),) = found

    def build(self, phases: Sequence[Phase] = (Phase(),), **options: Any) -> Programs:
        cached = options.pop("cached", False)
        stack = find_stack(self.captured) if cached else None
        assert not isinstance(stack, str)
        self.builder = ProgramBuilder(
            self.captured, self.sites, self.backend, Options(**options), torch.device("cpu")
        )
        return self.builder.build(phases, stack, NO_ROLES)

    def run(self, programs: Programs, phase: int = 0) -> Tensor:
        with torch.no_grad():
            bound = programs.bind(self.inputs, phase)
            carry, rest = programs.head(bound)
            outputs = programs.body(bound, carry, rest, phase)
            self.env = rest
            (out,) = programs.tail(bound, outputs, rest)
        return out

    def choice(self, *patterns: Any) -> HeadChoice:
        return HeadChoice(patterns, SiteGeometry("grid", text_before=False), GRID, 8, 8)


def dense(built: Built) -> Tensor:
    with torch.no_grad():
        return built.model(X)


def test_equal_blocks_are_lowered_once() -> None:
    built = Built(fuses=False)
    out = built.run(built.build())
    assert len(built.backend.lowered) == len(built.builder.programs) == 3
    torch.testing.assert_close(out, dense(built))


@pytest.mark.parametrize(("blocks", "programs"), [(2, 1), (12, 1), (14, 3), (15, 3), (19, 3)])
def test_a_backend_that_fuses_gets_several_blocks_at_once(blocks: int, programs: int) -> None:
    built = Built(blocks, fuses=True)
    out = built.run(built.build())
    assert len(built.backend.lowered) == programs
    torch.testing.assert_close(out, dense(built))


def test_joined_and_separate_programs_agree_to_the_bit() -> None:
    joined, apart = Built(15, fuses=True), Built(15, fuses=False)
    assert torch.equal(joined.run(joined.build()), apart.run(apart.build()))


def test_a_block_stack_is_never_joined_with_its_surroundings() -> None:
    built = Built(7, fuses=True)
    programs = built.build(cached=True)
    torch.testing.assert_close(built.run(programs), dense(built))
    with torch.no_grad():
        bound = programs.bind(built.inputs, 0)
        carry, rest = programs.head(bound)
        (residual,) = programs.body(bound, carry, rest, 0)
    x = built.model.embed(X)
    torch.testing.assert_close(carry[0], x)
    for block in built.model.blocks:
        x = block(x)
    torch.testing.assert_close(residual, x)
    assert programs.base == (0,)


def test_values_between_pieces_are_freed() -> None:
    built = Built(fuses=False)
    programs = built.build()
    built.run(programs)
    kept = [slot for slot in built.captured.outputs if isinstance(slot, int)]
    between = range(len(built.captured.inputs), built.captured.slots)
    assert [slot for slot in between if built.env[slot] is not None] == kept


def test_a_freed_value_is_gone_before_the_next_piece_runs() -> None:
    built = Built(fuses=False)
    programs = built.build()
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    lowered = built.backend.lowered[1].forward

    def watch(*arguments: Any) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        results = lowered(*arguments)
        seen.append(weakref.ref(results[0]))
        return results

    for key, call in built.builder.programs.items():
        if call == lowered:
            built.builder.programs[key] = watch
    programs = built.builder.build([Phase()], None, NO_ROLES)
    built.run(programs)
    assert len(alive) == 6
    assert max(alive) <= 1  # the block's own input


def test_phases_with_equal_choices_share_programs() -> None:
    built = Built()
    band = {site.id: built.choice(Band(window=8), Dense()) for site in built.sites}
    programs = built.build([Phase(), Phase(band), Phase()], cached=True)
    assert len(built.backend.lowered) == 4  # prefix, dense block, sparse block, suffix
    first, sparse, last = (built.run(programs, phase) for phase in range(3))
    assert torch.equal(first, last)
    assert not torch.allclose(first, sparse)
    torch.testing.assert_close(first, dense(built))


def test_patterns_are_inputs_so_blocks_with_other_patterns_share_a_program() -> None:
    built = Built()
    choices = {
        site.id: built.choice(Band(window=4 + number), Dense())
        for number, site in enumerate(built.sites)
    }
    built.run(built.build([Phase(choices)], cached=True))
    assert len(built.backend.lowered) == 3


def test_dense_patterns_everywhere_change_nothing_but_rounding() -> None:
    built = Built()
    choices = {site.id: built.choice(Dense(), Dense()) for site in built.sites}
    out = built.run(built.build([Phase(choices)], cached=True))
    torch.testing.assert_close(out, dense(built))


def test_each_site_gets_its_decision() -> None:
    built = Built()
    choices: dict[str, HeadChoice | str] = {
        site.id: built.choice(Dense(), Band(window=8)) for site in built.sites
    }
    choices["blocks.2#0"] = "not this one"
    built.build([Phase(choices)], cached=True)
    told = {
        d.site: (d.applied, d.reason)
        for d in built.builder.decisions
        if d.rule == "select_sparse_pattern"
    }
    assert told == {
        f"blocks.{k}#0": (False, "not this one")
        if k == 2
        else (True, "block-sparse, 2 heads, blocks of 8 x 8 tokens")
        for k in range(6)
    }
    fused = {d.site for d in built.builder.decisions if d.rule == "fuse_projections" and d.applied}
    assert fused == {f"blocks.{k}.to_{name}" for k in range(6) for name in "qkv"}


def test_each_site_says_which_executor_runs_it() -> None:
    built = Built()
    choices = {site.id: built.choice(Dense(), Band(window=8)) for site in built.sites}
    built.build([Phase(choices)])
    decisions = [d for d in built.builder.decisions if d.rule == "attention_executor"]
    assert {d.site for d in decisions} == set(choices)
    assert {d.reason.split(":")[0] for d in decisions} <= {"cpu", "flex"}
    assert all("ms forecast" in d.reason for d in decisions)


def test_programs_are_shared_by_executor_not_by_density(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"block": [8, 8], "channels": 64, "processors": 1, "host": 0.0, "tile": 0.0}
    costs = tuple(
        {**base, "executor": name, "start": start, "entry": entry}
        for name, start, entry in (("flex", 0.0, 1.0), ("cpu", 20.0, 0.1), ("sdpa", 21.0, 0.0))
    )
    monkeypatch.setattr(dispatch, "costs_of", lambda device: costs)
    monkeypatch.setattr(dispatch, "reasons_to_decline", lambda *args: {"gluon": "", "fa4": ""})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a CPU's times are divided by them
    built = Built()
    thin, wide = built.choice(Skip(), Band(window=2)), built.choice(Skip(), Band(window=4))
    rest = built.choice(Dense(), Band(window=16)), built.choice(Dense(), Dense())
    sites = [site.id for site in built.sites]
    built.build([Phase(dict(zip(sites, (thin, wide, *rest), strict=False)))], cached=True)
    told = [d.reason for d in built.builder.decisions if d.rule == "attention_executor"]
    assert [reason.replace(",", ":").split(":")[0] for reason in told] == [
        *("flex", "flex", "cpu", "sdpa")
    ]
    assert len(built.backend.lowered) == 5  # before, behind, flex, cpu, dense


def test_fused_weights_of_every_block_are_its_own() -> None:
    built = Built(fuses=True)
    built.build()
    assert len(built.builder.derived.tensors) == 6 * 2  # weight and bias


def test_an_unfused_option_reaches_the_passes() -> None:
    built = Built()
    out = built.run(built.build(fuse_projections=False))
    assert built.builder.derived.tensors == []
    assert torch.equal(out, dense(built))
