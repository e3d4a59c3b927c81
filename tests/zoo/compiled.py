"""A sequence of calls of one zoo model through a real backend, compared with eager call by call."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx

from .models import build, first_tensor, kwargs_for
from .runs import counts, records, relative_l2, resolutions


@dataclass(frozen=True)
class Outcome:
    """What came of one model.

    Attributes:
        graphs: compiled at each call; all but the first are recompilations.
        graphs_eager: the same of a backend that runs Dynamo's graphs as they are.
        graphs_inductor: the same of Inductor alone, where `graphs` differs from the former. Where a
            model breaks into several graphs, Dynamo guards on what the first hands to the next: on
            views of other tensors if PyTorch made it, on fresh tensors if Inductor did.
        relative_l2: distance to eager at each call, in float32.
        programs: distinct programs that were lowered, over all graphs.
        seconds: wall clock of the whole sequence, compilation included.
    """

    model: str
    calls: list[str]
    graphs: list[int]
    graphs_eager: list[int]
    graphs_inductor: list[int] | None = None
    relative_l2: list[float] = field(default_factory=list)
    programs: int = 0
    seconds: float = 0.0

    @property
    def as_many_graphs(self) -> bool:
        """Whether Dynamo compiled as often as it does without ditopt."""
        return self.graphs in (self.graphs_eager, self.graphs_inductor)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; errors rounded."""
        rounded = [float(f"{error:.3g}") for error in self.relative_l2]
        return {**asdict(self), "relative_l2": rounded, "seconds": round(self.seconds, 1)}


def full_sequence(name: str) -> list[dict[str, Any]]:
    """A first call, another timestep, three further resolutions, batch 2 at two resolutions."""
    first, *further = ({"hw": hw} for hw in resolutions(name))
    return [
        first,
        {**first, "t": 300.0},
        *further,
        {**first, "batch": 2},
        {**further[0], "batch": 2},
    ]


def short_sequence(name: str) -> list[dict[str, Any]]:
    """A first call, another timestep, one further resolution."""
    return full_sequence(name)[:3]


def describe(call: dict[str, Any]) -> str:
    """`8x8, t=300, batch=2`."""
    height, width = call["hw"]
    rest = [f"{key}={value:g}" for key, value in call.items() if key != "hw"]
    return ", ".join([f"{height}x{width}", *rest])


def go(
    name: str,
    sequence: list[dict[str, Any]],
    *,
    backend: str = "ditopt",
    options: dict[str, Any] | None = None,
) -> Outcome:
    """Run a sequence of calls of fresh, equal models by eager, by Dynamo alone and by a backend."""
    # Three of them: a model may fill a table at its first call, and then compiles differently.
    alone, reference, model = (build(name)[0] for _ in range(3))
    graphs_eager = counts(alone, sequence, name)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, options=options)
    graphs, errors, before = [], [], len(records())
    started = time.perf_counter()
    with torch.no_grad():
        for call in sequence:
            already = len(records())
            expected = first_tensor(reference(**kwargs_for(name, **call)))
            errors.append(relative_l2(first_tensor(compiled(**kwargs_for(name, **call))), expected))
            graphs.append(len(records()) - already)
    programs = sum(record.programs for record in records()[before:])
    seconds = time.perf_counter() - started
    graphs_inductor = None
    if backend == "ditopt" and graphs != graphs_eager:
        graphs_inductor = counts(build(name)[0], sequence, name, compile_fx)
    return Outcome(
        model=name,
        calls=[describe(call) for call in sequence],
        graphs=graphs,
        graphs_eager=graphs_eager,
        graphs_inductor=graphs_inductor,
        relative_l2=errors,
        programs=programs,
        seconds=seconds,
    )
