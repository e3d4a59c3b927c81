"""The two lowerings on the same canonical graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ditopt.capture import capture
from ditopt.errors import ConfigError, DitoptWarning, StrictModeError
from ditopt.pipeline import BACKENDS
from ditopt.torch_backend import compiled_graphs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu() + 1


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_lowered_graph_takes_and_returns_what_the_graph_does(name: str) -> None:
    backend, model, x = BACKENDS[name], Small(), torch.randn(3, 4)
    assert backend.name == name
    assert backend.available() is None
    results: list[Tensor] = []

    def probe(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm)
        (piece,) = captured.pieces
        code = piece.body.gm.code
        assert all(backend.supports(node) is None for node in piece.body.gm.graph.nodes)
        lowered = backend.lower(piece.body.gm, {})
        assert piece.body.gm.code == code
        with torch.no_grad():
            results.extend(lowered(*[inputs[slot] for slot in piece.inputs]))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=probe)(x)
        torch.testing.assert_close(results[0], model(x))


def test_ditopt_eager_is_bit_equal_where_nothing_is_fused() -> None:
    torch._dynamo.reset()
    model, x = Small().eval(), torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="ditopt_eager")(x), model(x))
    assert len(compiled_graphs(model)) == 1


def test_training_is_declined_by_name() -> None:
    torch._dynamo.reset()
    model, x = Small(), torch.randn(3, 4)
    with pytest.warns(DitoptWarning, match="training: gradients are enabled"):
        out = torch.compile(model, backend="ditopt_eager")(x)
    out.sum().backward()
    assert model.layer.weight.grad is not None
    (record,) = compiled_graphs(model)
    assert [d.applied for d in record.decisions] == [False]


def test_strict_mode_makes_a_fallback_an_error() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Small(), backend="ditopt_eager", options={"strict": True})
    with pytest.raises(Exception, match="training: gradients are enabled") as caught:
        compiled(torch.randn(3, 4))
    chain = (caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None))
    assert any(isinstance(error, StrictModeError) for error in chain)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"options": {"plam": "x"}}, "unknown ditopt option 'plam'"),
        ({"mode": "max-autotune-no-cudagraph"}, "unknown mode"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], text: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Small(), backend="ditopt_eager", **arguments)
    with torch.no_grad(), pytest.raises(Exception, match=text) as caught:
        compiled(torch.randn(3, 4))
    chain = (caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None))
    assert any(isinstance(error, ConfigError) for error in chain)
