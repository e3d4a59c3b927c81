"""Run the rewritten graph by PyTorch and the reference kernels: the oracle.

`ditopt_eager` differs from `ditopt` in this file only, so a fault that shows in both lies in
capture or in a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from ditopt.backends.base import Lowered


class EagerBackend:
    """Operator by operator, nothing fused."""

    name = "eager"
    fuses = False

    def available(self) -> str | None:
        """Always."""
        return None

    def supports(self, node: fx.Node) -> str | None:
        """Every node."""
        return None

    def lower(self, gm: fx.GraphModule, options: Mapping[str, Any]) -> Lowered:
        """The graph itself."""
        lowered: Lowered = gm.forward
        return lowered
