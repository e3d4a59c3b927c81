"""A backend that lowers nothing: it keeps each program's graph for the exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from ditopt.backends.base import Lowered


class Recorded:
    """A program that is still a graph; calling it runs the graph operator by operator."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __call__(self, *args: Any) -> Sequence[Any]:
        """What the graph returns."""
        results: Sequence[Any] = self.gm(*args)
        return results


class RecordingBackend:
    """Joins programs as Inductor's backend does, since they will be compiled by it."""

    name = "export"
    fuses = True

    def available(self) -> str | None:
        """Always."""
        return None

    def supports(self, node: fx.Node) -> str | None:
        """Every node; what cannot be exported is refused with the whole graph at hand."""
        return None

    def lower(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> Lowered:
        """Keep `gm`."""
        return Recorded(gm)
