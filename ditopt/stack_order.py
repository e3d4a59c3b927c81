"""Whether the block stack can run with its tokens in another order, and what to permute for that.

Tokens are put in order once before the first block and back once behind the last, together with
everything else that runs along them (RoPE tables, masks, position ids), if `token_axis` proves that
all pieces between commute with an order. Otherwise each attention reorders its own operands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ditopt.infer_layout import site_geometry
from ditopt.stack import slot_value
from ditopt.symbols import hint, is_symbolic
from ditopt.token_axis import follow
from ditopt.token_rules import NONE, Axes, Mixes

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.infer_layout import Grid
    from ditopt.sites import AttentionSite
    from ditopt.stack import Stack

Dims = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""For each slot the dimensions along tokens, and where the grid starts along each."""


@dataclass(frozen=True)
class StackOrder:
    """What runs along the tokens at the borders of pieces `first` to `end`.

    Attributes:
        entering: slots that come from before and are read inside, with their axes.
        leaving: slots that are in order inside and read behind.
    """

    first: int
    end: int
    entering: Dims
    leaving: Dims


def order_stack(
    captured: Captured, stack: Stack | str, grid: Grid, sites: Sequence[AttentionSite]
) -> StackOrder | str:
    """The stack's order, or why tokens cannot stay in one between its first and last block.

    Args:
        captured: the model.
        stack: its block stack, or why it has none.
        grid: of the tokens; sizes must be fixed.
        sites: the attentions of the model.
    """
    if isinstance(stack, str):
        return stack
    if any(is_symbolic(size) for size in grid):
        return "the graph serves several resolutions, which the analysis of tokens does not"
    frames, height, width = (hint(size) for size in grid)
    tokens = frames * height * width
    starts = {tokens: 0}
    ordered: dict[tuple[int, str], int] = {}
    for site in sites:
        if not stack.first <= site.piece < stack.end or site.form != "softmax":
            continue
        geometry = site_geometry(captured, site, grid)
        if isinstance(geometry, str):
            continue
        if geometry.part != "grid":
            return f"{site.id} attends within one {geometry.part}"
        length = hint(site.tokens_q)
        start = length - tokens if geometry.text_before else 0
        if starts.setdefault(length, start) != start:
            return f"the grid starts at different places of sequences of {length} tokens"
        ordered[site.piece, site.node] = start
    # A dimension may have the length of the tokens by chance; they rarely stand behind channels.
    found: StackOrder | str = ""
    for only_first in (False, True):
        found = _try(captured, stack, tokens, starts, ordered, only_first=only_first)
        if isinstance(found, StackOrder):
            break
    return found


def _try(
    captured: Captured,
    stack: Stack,
    tokens: int,
    starts: Mapping[int, int],
    ordered: Mapping[tuple[int, str], int],
    *,
    only_first: bool,
) -> StackOrder | str:
    axes: dict[int, Axes] = {}
    written: set[int] = set()
    for index in range(stack.first, stack.end):
        piece = captured.pieces[index]
        where = piece.path or piece.kind
        for slot in piece.inputs:
            if slot not in axes:
                axes[slot] = _along_tokens(captured, slot, starts, only_first=only_first)
        try:
            results, queries = follow(piece.body.gm, [axes[slot] for slot in piece.inputs], tokens)
        except Mixes as reason:
            return f"in {where} {reason}"
        for node, own in queries.items():
            start = ordered.get((index, node))
            if start is not None and own.get(2) != start:
                return f"in {where} {node} does not run along the tokens in order"
        axes |= zip(piece.outputs, results, strict=True)
        written |= set(piece.outputs)
    later = {slot for piece in captured.pieces[stack.end :] for slot in piece.inputs}
    later |= {slot for slot in captured.outputs if isinstance(slot, int)}
    entering = {slot for slot, own in axes.items() if own and slot not in written}
    return StackOrder(
        stack.first,
        stack.end,
        _dims(axes, entering),
        _dims(axes, (written | entering) & later),
    )


def _dims(axes: Mapping[int, Axes], slots: Set[int]) -> Dims:
    return tuple((slot, tuple(sorted(axes[slot].items()))) for slot in sorted(slots) if axes[slot])


def _along_tokens(
    captured: Captured, slot: int, starts: Mapping[int, int], *, only_first: bool
) -> Axes:
    """Axes of a value that enters the stack: its dimensions as long as a sequence of tokens.

    Parameters run along channels. A wrong axis is refuted by the analysis, not here.
    """
    value = slot_value(captured, slot)
    is_parameter = slot < len(captured.inputs) and captured.inputs[slot].role == "parameter"
    if is_parameter or not isinstance(value, torch.Tensor):
        return NONE
    found = {
        dim: starts[hint(size)]
        for dim, size in enumerate(value.shape)
        if not is_symbolic(size) and hint(size) in starts
    }
    return dict(list(found.items())[:1]) if only_first else found
