from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ditopt.root import compiled_in_parts, find_root, offload_hook, tensor_names


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Broken(nn.Module):
    """A graph break in the middle: the second graph's frame is not the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def roots(model: nn.Module) -> list[nn.Module | None]:
    """What `find_root` says for each graph of a model."""
    found: list[nn.Module | None] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(find_root(t for t in inputs if isinstance(t, nn.Parameter)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(2, 4))
    return found


def test_the_model_is_found_for_every_graph_of_it() -> None:
    model = Broken()
    found = roots(model)
    assert len(found) == 2
    assert all(root is model for root in found)


def test_a_graph_without_parameters_has_no_root() -> None:
    assert roots(nn.ReLU()) == [None]
    assert find_root([]) is None


def test_foreign_tensors_have_no_root() -> None:
    assert find_root([nn.Parameter(torch.ones(1))]) is None


def test_tied_tensors_go_by_their_first_name() -> None:
    model = Broken()
    model.second.layer.weight = model.first.layer.weight
    names = tensor_names(model)
    assert names[id(model.first.layer.weight)] == "first.layer.weight"
    assert names[id(model.second.layer.bias)] == "second.layer.bias"


def test_an_offload_hook_is_named() -> None:
    class AlignDevicesHook:
        offload = True

    model = Broken()
    assert offload_hook(model) is None
    model.second._hf_hook = AlignDevicesHook()
    assert offload_hook(model) == "AlignDevicesHook"


def test_blocks_compiled_for_themselves_are_recognised() -> None:
    model = Broken()
    assert not compiled_in_parts(model, model.first.parameters())
    model.first.compile(backend="eager")
    assert compiled_in_parts(model, model.first.parameters())
    assert not compiled_in_parts(model, model.second.parameters())
