"""Putting tokens in order before the block stack and back behind it, between the programs.

Values change in place of the environment's slots, so the programs of the blocks read them in order
without knowing. Each keeps its strides, which the programs were made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditopt.assembly import BoundPiece
from ditopt.layout import TokenLayout
from ditopt.patterns.blocks import real_tensors
from ditopt.symbols import evaluator
from ditopt.token_order import TokenOrder, inverse, sequence_permutation

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.site_inputs import ListChoice, SearchChoice
    from ditopt.sites import AttentionSite
    from ditopt.stack_order import Dims, StackOrder


def around_stack(
    found: StackOrder, order: TokenOrder, grid: tuple[int, int, int], device: torch.device
) -> tuple[BoundPiece, BoundPiece]:
    """What runs before the first piece of the stack, and what behind its last."""
    layout = TokenLayout(*grid)
    return (
        _moving(found.entering, order, layout, device, back=False),
        _moving(found.leaving, order, layout, device, back=True),
    )


def describe(found: StackOrder, order: TokenOrder, first: str, last: str) -> str:
    """The decision in words."""
    return (
        f"tokens in {order.kind} order once around {first} to {last}, with everything that runs "
        f"along them ({len(found.entering)} tensors in, {len(found.leaving)} out): between lie "
        "token-wise operators and attention only"
    )


def _moving(
    dims: Dims, order: TokenOrder, layout: TokenLayout, device: torch.device, *, back: bool
) -> BoundPiece:
    slots = tuple(slot for slot, _ in dims)
    move = TokenMove(tuple(axes for _, axes in dims), order, layout, device, back=back)
    return BoundPiece(move, slots, (), slots, (), 0)


class TokenMove:
    """Puts values in order, or back.

    Args:
        axes: for each value its dimensions along tokens, and where the grid starts along each.
        order: of the grid's tokens.
        layout: the grid; text before and behind it follows from a dimension's length.
        device: of the values.
        back: from the order to raster.
    """

    def __init__(
        self,
        axes: Sequence[tuple[tuple[int, int], ...]],
        order: TokenOrder,
        layout: TokenLayout,
        device: torch.device,
        *,
        back: bool,
    ) -> None:
        self.axes = axes
        self.back = back
        self._grid = (layout.frames, layout.height, layout.width)
        self._tokens = layout.tokens
        self._order = order
        self._device = device
        self._indices: dict[tuple[int, int], Tensor] = {}

    def index(self, length: int, start: int) -> Tensor:
        """What to select along a dimension of this length whose grid tokens begin at `start`."""
        if (length, start) not in self._indices:
            text = length - self._tokens - start
            moved = sequence_permutation(self._order, TokenLayout(*self._grid, start, text))
            with real_tensors():
                found = torch.from_numpy(inverse(moved) if self.back else moved)
                self._indices[length, start] = found.to(self._device)
        return self._indices[length, start]

    def __call__(self, *values: Tensor) -> list[Tensor]:
        """The values with their tokens moved; each keeps its strides."""
        moved = []
        for value, axes in zip(values, self.axes, strict=True):
            for dim, start in axes:
                out = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
                index = self.index(value.shape[dim], start)
                value = torch.index_select(value.detach(), dim, index, out=out)
            moved.append(value)
        return moved


def site_permutation(
    captured: Captured,
    site: AttentionSite,
    choice: ListChoice | SearchChoice,
    device: torch.device,
    *,
    back: bool,
) -> Callable[[Sequence[Any]], Any]:
    """A function from a call's environment to the order of one site's sequence, or its inverse."""
    order = choice.order
    assert order is not None
    sizes = evaluator(captured, (*choice.grid, site.tokens_q))

    @lru_cache(maxsize=64)
    def make(frames: int, height: int, width: int, tokens: int) -> Any:
        layout = choice.geometry.layout((frames, height, width), tokens)
        moved = sequence_permutation(order, layout)
        with real_tensors():
            return torch.from_numpy(inverse(moved) if back else moved).to(device)

    return lambda env: make(*sizes(env))
