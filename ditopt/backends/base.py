"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import fx

Lowered = Callable[..., Sequence[Any]]


class Exporter(Protocol):
    """Writes a canonical graph as a program of another runtime.

    Attributes:
        format: name of the engine format.
        suffix: of the program files.
        holds_weights: whether weights are inside a program, so that two cannot share them.
        keeps_strides: whether tensors cross its border with any strides, or row-major only.
    """

    format: str
    suffix: str
    holds_weights: bool
    keeps_strides: bool

    def available(self) -> str | None:
        """None when usable, else the reason and the remedy."""

    def export(self, gm: fx.GraphModule, path: Path, options: Mapping[str, Any]) -> list[str]:
        """Write `gm` to `path`; returns what it does by other means than the compiled model."""


class Backend(Protocol):
    """Turns one canonical graph into a callable with the same inputs and outputs.

    Attributes:
        name: as in `torch.compile(backend=...)`.
        fuses: whether neighbouring operators become one kernel, so that larger programs are faster.
    """

    name: str
    fuses: bool

    def available(self) -> str | None:
        """None when usable, else the reason and the remedy."""

    def supports(self, node: fx.Node) -> str | None:
        """None when the node can be lowered, else the reason."""

    def lower(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> Lowered:
        """Compile `gm`, which stays as it is; placeholders carry fake values in `meta["val"]`."""
