"""`harness(module, *inputs)`: the canonical graph of a module, to run passes on and to execute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ditopt.capture import Captured, capture
from ditopt.config import Options
from ditopt.graph import placeholders, verify
from ditopt.passes.base import FusedWeight, NodeDecision, PassContext
from ditopt.pipeline import PIPELINE, PassRunner


class PassHarness:
    """One captured module as a single body, with the values to run it on."""

    def __init__(self, module: nn.Module, *inputs: Tensor) -> None:
        self.module, self.inputs = module, inputs
        found: list[tuple[Captured, list[Any]]] = []

        def backend(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
            found.append((capture(gm, whole=True), list(examples)))
            return gm.forward

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(module, backend=backend, fullgraph=True)(*inputs)
        ((self.captured, examples),) = found
        (self.piece,) = self.captured.pieces
        env = [*examples, *self.captured.constants]
        self.arguments = [env[slot] for slot in self.piece.inputs]
        body = self.piece.body.gm
        self.gm = fx.GraphModule(body, copy.deepcopy(body.graph))

    def run(self, *passes: Any, options: Any = None, **context: Any) -> list[NodeDecision]:
        """Decisions of the passes, all of them by default; the runner verifies the graph."""
        roles = [self.captured.inputs[slot].role for slot in self.piece.inputs]
        own = frozenset(
            k for k, role in enumerate(roles) if role in ("parameter", "buffer", "constant")
        )
        ctx = PassContext(options=options or Options(), own=own, **context)
        runner = PassRunner(ctx.options, passes or PIPELINE)
        made = runner.run(self.gm, ctx, "test")
        verify(self.gm, "test")
        return [decision for _, decision in made]

    def nodes(self, target: Any) -> list[fx.Node]:
        return [node for node in self.gm.graph.nodes if node.target is target]

    def result(self, lists: Sequence[Tensor] = ()) -> Any:
        """What the graph returns; `lists` are the counts and ids of its sparse attentions."""
        further, given = [], iter(lists)
        for node in placeholders(self.gm)[len(self.arguments) :]:
            spec = node.meta["ditopt"]
            further.append(
                torch.cat([self.arguments[k] for k in spec.positions])
                if isinstance(spec, FusedWeight)
                else next(given)
            )
        with torch.no_grad():
            outputs = self.gm(*self.arguments, *further)
        return outputs[0] if len(outputs) == 1 else outputs

    def assert_lossless(self, out: Tensor) -> None:
        """At most twice as far from float64 as eager float32 is (and not nearer than rounding)."""
        with torch.no_grad():
            eager = self.module(*self.inputs)
            exact = copy.deepcopy(self.module).double()(*(x.double() for x in self.inputs))
        floor = torch.finfo(eager.dtype).eps
        own = float((eager - exact).norm() / exact.norm())
        assert float((out - exact).norm() / exact.norm()) <= 2 * max(own, floor)


@pytest.fixture
def harness() -> type[PassHarness]:
    torch.manual_seed(0)
    return PassHarness
