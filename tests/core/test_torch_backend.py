"""How the backends behave under torch.compile: what they keep, and what they decline by name."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ditopt.errors import DitoptWarning
from ditopt.torch_backend import compiled_graphs

from ..zoo.models import build, first_tensor, kwargs_for


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """Two blocks of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 8, 16)


def test_both_backends_are_registered():
    assert {"ditopt", "ditopt_eager"} <= set(torch._dynamo.list_backends())


def test_module_compile(tiny, x):
    with torch.no_grad():
        expected = tiny(x)
        tiny.compile(backend="ditopt")
        torch.testing.assert_close(tiny(x), expected, rtol=1e-5, atol=1e-6)
    (record,) = compiled_graphs(tiny)
    assert [path for kind, path in record.pieces if kind == "block"] == ["blocks.0", "blocks.1"]
    assert record.programs < len(record.pieces) or len(record.pieces) == 2


def test_a_result_that_is_no_view_stays_none():
    """Dynamo guards the next graph of a model that breaks on whether it is handed a view."""

    class Copied(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1).transpose(0, 1).reshape(-1)

    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = Copied()(x)
        result = torch.compile(Copied(), backend="ditopt_eager")(x)
    assert torch.equal(result, expected)
    assert expected._base is None
    assert result._base is None


def test_options_of_inductor_are_handed_on(tiny, x):
    with torch.no_grad():
        compiled = torch.compile(tiny, backend="ditopt", options={"inductor": {"no_such": 1}})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no_such"):
            compiled(x)


def test_unknown_option_is_named(tiny, x):
    compiled = torch.compile(tiny, backend="ditopt_eager", options={"fuse_projection": False})
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="unknown ditopt option 'fuse_projection'"),
    ):
        compiled(x)


def test_unknown_mode_is_named(tiny, x):
    compiled = torch.compile(tiny, backend="ditopt_eager", mode="max-autotun")
    with torch.no_grad(), pytest.raises(Exception, match="unknown mode 'max-autotun'"):
        compiled(x)


@pytest.mark.parametrize("backend", ["eager", "ditopt_eager"])
def test_fullgraph_holds_where_it_holds_for_eager(backend):
    # Mochi breaks into 11 graphs by default; fullgraph=True captures its dynamic shapes
    model, arguments = build("mochi")
    with torch.no_grad():
        expected = first_tensor(model(**arguments))
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(first_tensor(compiled(**arguments)), expected)


@pytest.mark.parametrize("backend", ["eager", "ditopt_eager"])
def test_fullgraph_fails_where_it_fails_for_eager(backend):
    model, arguments = build("omnigen")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(**arguments)


def test_inference_mode_and_no_grad(tiny, x):
    compiled = torch.compile(tiny, backend="ditopt_eager")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(x), tiny(x))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_bfloat16(name, fuse):
    oracle, arguments = build(name)
    model, _ = build(name)
    model.to(torch.bfloat16)
    arguments = {
        key: value.to(torch.bfloat16)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in kwargs_for(name).items()
    }
    oracle.double()
    exact_arguments = {
        key: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in arguments.items()
    }
    compiled = torch.compile(model, backend="ditopt_eager", options={"fuse_projections": fuse})
    with torch.no_grad():
        exact = first_tensor(oracle(**exact_arguments))
        eager = first_tensor(model(**arguments))
        result = first_tensor(compiled(**arguments))
    assert result.dtype == eager.dtype == torch.bfloat16
    if not fuse:
        assert torch.equal(result, eager)
    # fused projections sum in another order: at most twice eager's own rounding error
    assert (result.double() - exact).norm() <= 2 * (eager.double() - exact).norm()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_compile_repeated_blocks_is_declined_by_name(name):
    model, arguments = build(name)
    with torch.no_grad():
        expected = first_tensor(model(**arguments))
        model.compile_repeated_blocks(backend="ditopt_eager")
        with pytest.warns(DitoptWarning, match="compile_repeated_blocks"):
            result = first_tensor(model(**arguments))
    assert torch.equal(result, expected)
    reasons = [d.reason for record in compiled_graphs(model) for d in record.decisions]
    assert reasons
    assert all(reason.startswith("compile_repeated_blocks") for reason in reasons)


@pytest.mark.parametrize("backend", ["ditopt", "ditopt_eager"])
def test_training_is_declined_by_name(tiny, x, backend):
    loss = tiny(x).square().sum()
    expected = torch.autograd.grad(loss, list(tiny.parameters()))
    compiled = torch.compile(tiny, backend=backend)
    with pytest.warns(DitoptWarning, match="training"):
        loss = compiled(x).square().sum()
    gradients = torch.autograd.grad(loss, list(tiny.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_gradients_off_for_the_weights_is_no_training(tiny, x):
    tiny.requires_grad_(False)
    compiled = torch.compile(tiny, backend="ditopt_eager")
    assert torch.equal(compiled(x), tiny(x))
    assert compiled_graphs(tiny)[-1].attention


def test_cpu_offload_of_a_model_is_declined_by_name(tiny, x):
    hooks = pytest.importorskip("accelerate.hooks")
    expected = tiny(x)
    hooks.add_hook_to_module(tiny, hooks.CpuOffload(execution_device="cpu"))
    compiled = torch.compile(tiny, backend="ditopt_eager")
    with torch.no_grad(), pytest.warns(DitoptWarning, match="CPU offload"):
        result = compiled(x)
    assert torch.equal(result, expected)


def test_cpu_offload_of_layers_is_declined_by_name(tiny, x):
    accelerate = pytest.importorskip("accelerate")
    expected = tiny(x)
    accelerate.cpu_offload(tiny, execution_device=torch.device("cpu"))
    compiled = torch.compile(tiny, backend="ditopt_eager")
    with torch.no_grad(), pytest.warns(DitoptWarning, match="CPU offload"):
        result = compiled(x)
    assert torch.equal(result, expected)


def test_strict_turns_a_decline_into_an_error(tiny, x):
    compiled = torch.compile(tiny, backend="ditopt_eager", options={"strict": True})
    with pytest.raises(Exception, match="training: gradients are enabled"):
        compiled(x)


class Breaking(Tiny):
    """The same model, with a graph break between the blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


def test_a_graph_break_is_told(x):
    torch.manual_seed(0)
    model = Breaking().eval()
    with torch.no_grad():
        expected = model(x)
        result = torch.compile(model, backend="ditopt_eager")(x)
    assert torch.equal(result, expected)
    first, second = compiled_graphs(model)
    assert not [d for d in first.decisions if d.rule == "one_graph"]
    (told,) = [d for d in second.decisions if d.rule == "one_graph"]
    assert not told.applied
    assert told.reason.startswith("a graph break in test_torch_backend.py, line ")
    assert told.reason.endswith(" splits the model: its steps cannot be cached")


def test_strict_refuses_a_graph_break(x):
    model = Breaking().eval()
    with torch.no_grad(), pytest.raises(Exception, match="a graph break in test_torch_backend"):
        torch.compile(model, backend="ditopt_eager", options={"strict": True})(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(tiny, x, enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with torch.no_grad():
            torch.compile(tiny, backend="ditopt_eager")(x)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
