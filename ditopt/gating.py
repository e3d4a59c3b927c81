"""From a plan's gate to the runtime's: what it defaults to, and whose ranks decide together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ditopt.errors import PlanError
from ditopt.graph import arguments
from ditopt.runtime import Gate

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.plan import Cache
    from ditopt.stack import Stack


def runtime_gate(cache: Cache, captured: Captured, stack: Stack, group: str | None) -> Gate | None:
    """The gate of a cached plan, or None.

    Args:
        cache: the plan's.
        captured: the model. Where its own graph communicates between ranks (context or tensor
            parallelism), these see parts of one request and have to agree.
        stack: what a skip call leaves out.
        group: name of the process group to decide in, where the graph does not show one.

    Raises:
        PlanError: the gate looks at something that this model does not have.
    """
    gate = cache.gate
    if gate is None:
        return None
    if gate.kind == "input" and all(base is None for base in stack.bases):
        raise PlanError(
            "cache.gate.kind: no input of the block stack continues in its output, so there is "
            "nothing to compare",
            remedy="Use first_block.",
        )
    order = gate.order if gate.order is not None else min(1, cache.history - 1)
    return Gate(gate.kind, gate.threshold, order, group or next(_groups(captured), None))


def _groups(captured: Captured) -> Iterator[str]:
    """Names of the process groups that the model's own collectives use."""
    for body in captured.bodies.values():
        for node in body.gm.graph.nodes:
            target = node.target
            if (
                isinstance(target, torch._ops.OpOverload)
                and target.namespace == "_c10d_functional"
                and isinstance((last := arguments(node)[-1]), str)
            ):
                yield last
