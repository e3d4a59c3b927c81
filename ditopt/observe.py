"""Run a model's canonical graph by operators and show attentions and block stack to an observer.

The profiler sees exactly the sites, with the ids, that a plan will name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx, nn

from ditopt.capture import Captured, capture
from ditopt.infer_layout import Grid, SiteGeometry, infer_grid, site_geometry
from ditopt.sites import AttentionSite, LinearSite, attention_operands, find_sites
from ditopt.stack import Stack, find_stack
from ditopt.symbols import hint

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout


class Observer(Protocol):
    """What is told during each call of the model, in execution order."""

    def suggest_layout(self, layout: TokenLayout) -> None:
        """The token grid that the graph shows; before the first attention."""

    def attention(
        self,
        site: AttentionSite,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        mask: Tensor | None,
    ) -> None:
        """One softmax attention; q, k, v are [B, H, N, D]."""

    def stack(self, base: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        """The block stack's outputs, and for each the value that it is a residual of, or None."""


class LinearObserver(Observer, Protocol):
    """An observer that is told about the linear layers of the blocks too."""

    def linear(
        self, site: LinearSite, source: str, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        """One linear layer of x [..., K]; `source` names the node that made x in the piece."""


def observe(model: nn.Module, observer: Observer | LinearObserver) -> Callable[..., Any]:
    """A callable like `model` that computes the same and shows it to `observer`."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return _Observed(capture(gm), inputs, observer)

    observed: Callable[..., Any] = torch.compile(model, backend=backend)
    return observed


class _Observed:
    """One captured graph, run with an interpreter for each body."""

    def __init__(
        self, captured: Captured, inputs: Sequence[Any], observer: Observer | LinearObserver
    ) -> None:
        self._captured = captured
        self._observer = observer
        attention, linear = find_sites(captured)
        self._linears = (
            {(s.piece, s.node): s for s in linear} if hasattr(observer, "linear") else {}
        )
        self._sites = {(s.piece, s.node): s for s in attention if s.form == "softmax"}
        found = find_stack(captured)
        self._stack: Stack | None = found if isinstance(found, Stack) else None
        inferred = infer_grid(captured, inputs)
        self._layout = (
            _main_layout(captured, attention, inferred[0]) if inferred is not None else None
        )

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        captured, stack = self._captured, self._stack
        if self._layout is not None:
            self._observer.suggest_layout(self._layout)
        spare = [None] * (captured.slots - len(captured.inputs))
        env: list[Any] = [*inputs, *captured.constants, *spare]
        for index, piece in enumerate(captured.pieces):
            runner = _Telling(piece.body.gm, self._observer, self._sites, self._linears, index)
            results = runner.run(*[env[slot] for slot in piece.inputs])
            for slot, value in zip(piece.outputs, results, strict=True):
                env[slot] = value
            if stack is not None and index == stack.end - 1:
                bases = [None if slot is None else env[slot] for slot in stack.bases]
                self._observer.stack(bases, [env[slot] for slot in stack.outputs])
        return tuple(env[item] if isinstance(item, int) else item[1] for item in captured.outputs)


class _Telling(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        observer: Any,
        sites: dict[tuple[int, str], AttentionSite],
        linears: dict[tuple[int, str], LinearSite],
        piece: int,
    ) -> None:
        super().__init__(gm)
        self._observer = observer
        self._linears = linears
        self._told = sites
        self._piece = piece

    def run_node(self, n: fx.Node) -> Any:
        site = self._told.get((self._piece, n.name))
        if site is not None:
            q, k, v, mask, scale = attention_operands(n)
            self._observer.attention(
                site,
                self.env[q],
                self.env[k],
                self.env[v],
                scale=scale,
                mask=self.env[mask] if isinstance(mask, fx.Node) else None,
            )
        linear = self._linears.get((self._piece, n.name))
        if linear is not None:
            nodes = [arg for arg in n.args if isinstance(arg, fx.Node)]
            x, weight, *bias = (self.env[node] for node in nodes)
            self._observer.linear(linear, nodes[0].name, x, weight, bias[0] if bias else None)
        return super().run_node(n)


def _main_layout(
    captured: Captured, sites: Sequence[AttentionSite], grid: Grid
) -> TokenLayout | None:
    """The layout of the longest self or joint attention: there patterns pay most."""
    candidates = [s for s in sites if s.kind != "cross" and s.form == "softmax"]
    for site in sorted(candidates, key=lambda s: -hint(s.tokens_q)):
        geometry = site_geometry(captured, site, grid)
        if isinstance(geometry, SiteGeometry):
            frames, height, width = (hint(size) for size in grid)
            return geometry.layout((frames, height, width), hint(site.tokens_q))
    return None
