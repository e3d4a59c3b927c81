"""Sizes of a symbolic capture: their values at the first call, and at any later one.

One compiled graph may serve several resolutions and prompt lengths. Choices that depend on a size
(block lists) are then made when the call shows it. Nothing here adds a guard: `int(size)` would,
and Dynamo would compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ditopt.capture import Captured

Sizes = tuple[int, ...]


def hint(size: Any) -> int:
    """The value that a size had when the graph was captured."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return int(size)


def has_hint(size: Any) -> bool:
    """Whether that is known; a size that depends on data has none."""
    return not isinstance(size, torch.SymInt) or size.node.has_hint()


def is_symbolic(size: Any) -> bool:
    """Whether a size may differ from call to call."""
    return isinstance(size, torch.SymInt) and not size.node.is_constant()


def evaluator(captured: Captured, sizes: Sequence[Any]) -> Callable[[Sequence[Any]], Sizes]:
    """A function from the environment of a call to the values of `sizes`.

    The symbols are inputs of the captured graph; results are kept per combination of their values.
    """
    if not any(is_symbolic(size) for size in sizes):
        fixed = tuple(hint(size) for size in sizes)
        return lambda env: fixed
    slots = [
        (slot, item.fake.node.expr)
        for slot, item in enumerate(captured.inputs)
        if item.role == "symbol" and isinstance(item.fake, torch.SymInt)
    ]
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]

    @lru_cache(maxsize=64)
    def evaluate(values: Sizes) -> Sizes:
        known = {symbol: value for (_, symbol), value in zip(slots, values, strict=True)}
        return tuple(
            int(e.xreplace(known)) if hasattr(e, "xreplace") else int(e) for e in expressions
        )

    return lambda env: evaluate(tuple(int(env[slot]) for slot, _ in slots))
