"""One sequence of calls of each zoo model through `ditopt_eager`, made once and read by every test.

The sequence: a first call, another timestep, three further resolutions. Dynamo compiles the first
call for its shapes and the third with symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from ditopt import capture as capture_module
from ditopt import torch_backend
from ditopt.torch_backend import Compiled, ditopt_eager

from .models import ZOO, build, first_tensor, kwargs_for

if TYPE_CHECKING:
    from ditopt.capture import Captured

# What breaks into several graphs under plain torch.compile, and why (torch 2.13, diffusers 0.42).
BROKEN = {
    "hidream": "experts are picked by indexing with booleans",
    "lumina2": "lengths are read off the mask with tolist()",
    "omnigen": "it branches on the largest position id",
    "hunyuan_video15": "it branches on whether the image is all zeros",
    "mochi": "text tokens are picked by the mask with nonzero()",
}
ONE_GRAPH = [name for name in ZOO if name not in BROKEN]
SQUARE_ONLY = {"dit"}  # its own unpatchify takes the root of the token count


def resolutions(name: str) -> list[tuple[int, int]]:
    """The first resolution and three further ones; oblong where the model can."""
    if name in SQUARE_ONLY:
        return [(8, 8), (6, 6), (10, 10), (12, 12)]
    return [(8, 8), (6, 10), (10, 8), (12, 6)]


def calls(name: str) -> list[dict[str, Any]]:
    """What is varied between the calls of the sequence, as arguments of `kwargs_for`."""
    first, *further = resolutions(name)
    return [{"hw": first}, {"hw": first, "t": 300.0}, *({"hw": hw} for hw in further)]


@dataclass
class Graph:
    """One graph that Dynamo handed to the backend, and the arguments that it ran with last."""

    gm: fx.GraphModule
    captured: Captured
    compiled: Compiled
    examples: list[Any]
    arguments: tuple[Any, ...] = ()


@dataclass
class Run:
    """What came of the sequence: for each call the results and the graphs compiled on the way."""

    model: nn.Module
    expected: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    graphs: list[list[Graph]] = field(default_factory=list)

    @property
    def static(self) -> list[Graph]:
        """The graphs of the first call."""
        return self.graphs[0]

    @property
    def dynamic(self) -> list[Graph]:
        """The graphs of the first call at another resolution; their sizes are symbols."""
        return self.graphs[2]


def records() -> list[Compiled]:
    """What ditopt noted about every graph so far, also those without a parameter of any model."""
    return torch_backend._compiled


def relative_l2(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    difference = result.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def as_it_is(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend that runs Dynamo's graphs as they are."""
    return gm.forward


def counts(
    model: nn.Module,
    sequence: Sequence[dict[str, Any]],
    name: str,
    backend: Callable[[fx.GraphModule, list[Any]], Any] = as_it_is,
) -> list[int]:
    """Graphs compiled at each call of a sequence by a backend."""
    seen: list[int] = []

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen[-1] += 1
        return backend(gm, inputs)

    torch.compiler.reset()
    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        for call in sequence:
            seen.append(0)
            compiled(**kwargs_for(name, **call))
    return seen


@lru_cache(maxsize=4)  # tests come in the order of the models
def run(name: str) -> Run:
    """The sequence of one model."""
    model, _ = build(name)
    made = Run(model)
    captured: list[Captured] = []
    capture = capture_module.capture

    def remember(gm: fx.GraphModule, **options: Any) -> Captured:
        captured.append(capture(gm, **options))
        return captured[-1]

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with mock.patch.object(capture_module, "capture", remember):
            compiled = ditopt_eager(gm, inputs)
        graph = Graph(gm, captured[-1], records()[-1], list(inputs))
        made.graphs[-1].append(graph)

        def call(*arguments: Any) -> Any:
            graph.arguments = arguments
            return compiled(*arguments)

        return call

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for arguments in calls(name):
            made.graphs.append([])
            made.expected.append(first_tensor(model(**kwargs_for(name, **arguments))))
            made.results.append(first_tensor(compiled(**kwargs_for(name, **arguments))).clone())
    return made
