"""What a plan chooses at one attention site, and the inputs of its program that depend on it.

Block lists and forced blocks are made from the sizes of each call, so that one program serves every
resolution and prompt; equal sizes give the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ditopt.patterns import HeadPattern, Hierarchical, block_lists, block_mask
from ditopt.patterns.blocks import real_tensors
from ditopt.symbols import evaluator

if TYPE_CHECKING:
    import torch

    from ditopt.capture import Captured
    from ditopt.infer_layout import Grid, SiteGeometry
    from ditopt.patterns.selectors import PooledSelector
    from ditopt.sites import AttentionSite
    from ditopt.token_order import TokenOrder


@dataclass(frozen=True, eq=False)
class Remainder:
    """Linear attention on the blocks that are left out.

    Attributes:
        phi: feature map.
        projection: [H, D, D], from the plan's side file.
    """

    phi: str
    projection: torch.Tensor


@dataclass(frozen=True)
class HeadChoice:
    """A pattern per head, on the site's part of the token grid."""

    patterns: tuple[HeadPattern, ...]
    geometry: SiteGeometry
    grid: Grid
    block_q: int
    block_k: int
    order: TokenOrder | None = None
    remainder: Remainder | None = None


@dataclass(frozen=True)
class SelectorChoice:
    """Blocks that all heads choose from the data; the grid says what is kept whatever it scores."""

    selector: PooledSelector
    geometry: SiteGeometry
    grid: Grid
    block_q: int
    block_k: int
    order: TokenOrder | None = None
    remainder: Remainder | None = None


@dataclass(frozen=True)
class SearchChoice:
    """Blocks of 16 that all heads search from coarse to fine."""

    selector: Hierarchical
    geometry: SiteGeometry
    grid: Grid
    order: TokenOrder | None = None


Choice = HeadChoice | SelectorChoice | SearchChoice
"""What a plan may choose at an attention site."""


def block_input(
    captured: Captured,
    site: AttentionSite,
    choice: HeadChoice | SelectorChoice,
    part: int,
    device: torch.device,
) -> Callable[[Sequence[Any]], Any]:
    """A function from a call's environment to counts (part 0), ids (part 1) or forced blocks."""
    sizes = evaluator(captured, (*choice.grid, site.tokens_q, site.tokens_k))
    blocks = (choice.block_q, choice.block_k)

    @lru_cache(maxsize=64)
    def make(frames: int, height: int, width: int, tokens_q: int, tokens_k: int) -> Any:
        layout = choice.geometry.layout((frames, height, width), tokens_q)
        shape = (layout, tokens_q, tokens_k, *blocks)
        order = choice.order
        if isinstance(choice, SelectorChoice):
            with real_tensors():
                return block_mask(choice.selector.keep, *shape, order).to(device)
        return block_lists(choice.patterns, *shape, device, order)[part]

    return lambda env: make(*sizes(env))
