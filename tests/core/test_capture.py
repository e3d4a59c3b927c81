from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from ditopt.capture import Captured, capture
from ditopt.graph import fake_value, free_symbols, graph_key, placeholders, target_name
from ditopt.normalize import MutatesInput, normalize
from ditopt.partition import partition


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    """A prefix, equal blocks and a suffix."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        if shift is not None:
            x = x + shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Caught:
    """Dynamo's graph of a model, what capture made of it, and its inputs."""

    gm: fx.GraphModule
    captured: Captured
    inputs: list[Any]


def catch(
    model: nn.Module, *args: Any, dynamic: bool | None = None, whole: bool = False, **kw: Any
) -> Caught:
    caught = Caught()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        caught.gm, caught.inputs = gm, inputs
        caught.captured = capture(gm, whole=whole)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kw)
    return caught


def run(caught: Caught, inputs: list[Any] | None = None) -> Any:
    """Run the pieces one after the other."""
    captured = caught.captured
    env = [*(inputs or caught.inputs), *captured.constants, *[None] * captured.slots]
    with torch.no_grad():
        for piece in captured.pieces:
            results = piece.body.gm(*[env[slot] for slot in piece.inputs])
            for slot, value in zip(piece.outputs, results, strict=True):
                env[slot] = value
    return tuple(env[o] if isinstance(o, int) else o[1] for o in captured.outputs)


X = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))


def test_prefix_blocks_suffix() -> None:
    pieces = catch(Model(), X).captured.pieces
    assert [(piece.kind, piece.path) for piece in pieces] == [
        ("prefix", ""),
        ("block", "blocks.0"),
        ("block", "blocks.1"),
        ("block", "blocks.2"),
        ("suffix", ""),
    ]


def test_equal_blocks_share_one_body() -> None:
    captured = catch(Model(), X).captured
    assert len({piece.body.key for piece in captured.pieces[1:4]}) == 1
    assert len(captured.bodies) == 3


def test_a_block_of_another_width_has_a_body_of_its_own() -> None:
    model = Model()
    model.blocks[1].out = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    keys = [piece.body.key for piece in catch(model, X).captured.pieces[1:4]]
    assert keys[0] == keys[2] != keys[1]


def test_the_pieces_compute_the_model_to_the_bit() -> None:
    model = Model().eval()
    caught = catch(model, X)
    assert torch.equal(run(caught)[0], model(X))


def test_a_whole_graph_is_one_piece() -> None:
    model = Model()
    caught = catch(model, X, whole=True)
    assert [piece.kind for piece in caught.captured.pieces] == ["whole"]
    assert torch.equal(run(caught)[0], model(X))


def test_without_blocks_there_is_one_piece() -> None:
    assert [p.kind for p in catch(nn.Linear(4, 4), X).captured.pieces] == ["whole"]


def test_inputs_have_names_and_roles() -> None:
    class Tabled(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(8))

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            assert shift is not None
            return super().forward(x, shift + self.table)

    found = {i.name: i.role for i in catch(Tabled(), X, shift=torch.ones(8)).captured.inputs}
    assert found["embed.weight"] == found["blocks.0.qkv.bias"] == "parameter"
    assert found["table"] == "buffer"
    assert found["x"] == found["shift"] == "user"


def test_tensors_that_the_graph_holds_become_constants() -> None:
    """As Dynamo makes them when it is told to install parameters instead of passing them."""
    model = Model()
    with torch._dynamo.config.patch(install_free_tensors=True):
        caught = catch(model, X)
    captured = caught.captured
    assert len(captured.constants) == len(list(model.parameters()))
    assert [i.role for i in captured.inputs] == ["user"] + ["constant"] * len(captured.constants)
    assert torch.equal(run(caught)[0], model(X))


def test_blocks_with_other_constants_do_not_share_a_body() -> None:
    class Scaled(Block):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([self.scale] * 8)

    model = Model()
    model.blocks = nn.ModuleList(Scaled(scale) for scale in (1.0, 2.0, 2.0))
    caught = catch(model, X)
    keys = [piece.body.key for piece in caught.captured.pieces[1:4]]
    assert keys[0] != keys[1] == keys[2]
    assert torch.equal(run(caught)[0], model(X))


def test_the_graph_that_dynamo_made_is_not_changed() -> None:
    graphs: list[tuple[str, str]] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        before = gm.code
        capture(gm)
        gm.recompile()
        graphs.append((before, gm.code))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Model(), backend=backend)(X)
    assert graphs[0][0] == graphs[0][1]


def test_writes_inside_a_block_become_functional() -> None:
    class Rope(Block):
        def forward(self, x: Tensor) -> Tensor:
            turned = torch.empty_like(x)
            turned[..., 0::2], turned[..., 1::2] = -x[..., 1::2], x[..., 0::2]
            return super().forward(turned)

    model = Model()
    model.blocks = nn.ModuleList(Rope() for _ in range(2))
    caught = catch(model, X)
    targets = {target_name(n.target) for p in caught.captured.pieces for n in p.body.gm.graph.nodes}
    assert "aten.copy_.default" not in targets
    assert torch.equal(run(caught)[0], model(X))


def test_a_write_across_pieces_keeps_the_graph_whole() -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            return super().forward(x)

    model = Model()
    model.blocks = nn.ModuleList(Writes() for _ in range(2))
    caught = catch(model, X)
    assert [piece.kind for piece in caught.captured.pieces] == ["whole"]
    (decision,) = caught.captured.decisions
    assert (decision.rule, decision.applied) == ("partition", False)
    assert decision.reason.startswith("kept whole: the piece writes in place into")
    assert torch.equal(run(caught)[0], model(X))


def test_a_write_into_the_callers_tensor_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0)

    with pytest.raises(Exception, match="writes in place into"):
        catch(Writes(), X.clone())


def test_symbolic_sizes_are_inputs_of_the_pieces_that_mention_them() -> None:
    model = Model()
    caught = catch(model, X, dynamic=True)
    captured = caught.captured
    symbols = [k for k, item in enumerate(captured.inputs) if item.role == "symbol"]
    assert symbols
    for piece in captured.pieces:
        mentioned = set().union(
            *(free_symbols(fake_value(node)) for node in piece.body.gm.graph.nodes)
        )
        assert not mentioned or set(piece.inputs) & set(symbols)
    other = torch.randn(1, 9, 4)
    longer = [
        9
        if k in symbols
        else other
        if value is X or getattr(value, "shape", None) == X.shape
        else value
        for k, value in enumerate(caught.inputs)
    ]
    assert torch.equal(run(caught, longer)[0], model(other))


def test_attention_linear_and_norms_stay_whole() -> None:
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.rms(self.norm(x)))

    model = Model()
    model.blocks = nn.ModuleList(Normed() for _ in range(2))
    body = catch(model, X).captured.pieces[1].body.gm
    targets = [target_name(node.target) for node in body.graph.nodes]
    for kept in ("scaled_dot_product_attention", "linear", "layer_norm", "rms_norm"):
        assert f"aten.{kept}.default" in targets
    assert all("val" in node.meta for node in body.graph.nodes if node.op == "call_function")


def test_normalize_names_what_is_written() -> None:
    reasons: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        with pytest.raises(MutatesInput) as caught:
            normalize(gm)
        reasons.append(str(caught.value))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.mul_(2), backend=backend)(X.clone())
    assert "writes in place into" in reasons[0]


def test_keys_depend_on_structure_alone() -> None:
    first, again = (catch(Model(), X).captured for _ in range(2))
    assert [p.body.key for p in first.pieces] == [p.body.key for p in again.pieces]
    wider = catch(Model(), torch.randn(2, 6, 4)).captured
    assert first.pieces[1].body.key != wider.pieces[1].body.key
    assert graph_key(first.pieces[1].body.gm) == first.pieces[1].body.key


def test_a_later_visit_to_a_block_is_not_the_block() -> None:
    """DiT's last layer reads the first block's embedding."""

    class Again(Model):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return super().forward(x) + self.blocks[0].out(self.embed(x)).mean()

    pieces = catch(Again(), X).captured.pieces
    assert [p.path for p in pieces if p.kind == "block"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert pieces[-1].kind == "suffix"


def test_work_between_blocks_is_glue() -> None:
    class Glued(Model):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x) * 2
            return self.head(x)

    kinds = [p.kind for p in catch(Glued(), X).captured.pieces]
    assert kinds == ["prefix", "block", "glue", "block", "glue", "block", "suffix"]


def test_lists_inside_a_block_and_small_heads_are_no_blocks() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x)

    caught = catch(Inner(), X)
    assert [p.kind for p in caught.captured.pieces] == ["whole"]
    assert partition([]) == []


def test_every_piece_takes_what_its_body_asks_for() -> None:
    for piece in catch(Model(), X, dynamic=True).captured.pieces:
        assert len(piece.inputs) == len(placeholders(piece.body.gm))
