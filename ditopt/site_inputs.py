"""What a plan chooses at one attention site, and the inputs of its program that depend on it.

Block lists and forced blocks are made from the sizes of each call, so that one program serves every
resolution and prompt; equal sizes give the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch

from ditopt.kernels.block_sparse_attention.lists import from_blocks
from ditopt.kernels.block_sparse_attention.pooling import dropped_bits, log_lengths
from ditopt.patterns import HeadPattern, Hierarchical, TwoMasks, block_lists, block_mask
from ditopt.patterns.blocks import real_tensors
from ditopt.symbols import evaluator

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.infer_layout import Grid, SiteGeometry
    from ditopt.patterns import BlockSelector, OrderSelector
    from ditopt.quantization.arithmetic import ArithmeticRule
    from ditopt.sites import AttentionSite
    from ditopt.token_order import TokenOrder


@dataclass(frozen=True)
class BlockMeans:
    """The mean of each block that is left out, in the same softmax."""


@dataclass(frozen=True, eq=False)
class LinearPart:
    """Linear attention on the blocks that are left out.

    Attributes:
        phi: feature map.
        projection: [H, D, D], from the plan's side file.
    """

    phi: str
    projection: torch.Tensor


Remainder = BlockMeans | LinearPart
"""What stands for the blocks that an attention leaves out."""


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
    arithmetic: ArithmeticRule | None = None


@dataclass(frozen=True)
class SelectorChoice:
    """Blocks that all heads choose from the data; the grid says what is kept whatever it scores."""

    selector: BlockSelector
    geometry: SiteGeometry
    grid: Grid
    block_q: int
    block_k: int
    order: TokenOrder | None = None
    remainder: Remainder | None = None


@dataclass(frozen=True)
class OrderChoice:
    """Blocks in an order of tokens that each head chooses from the data."""

    selector: OrderSelector
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


@dataclass(frozen=True)
class DenseChoice:
    """Every block of all heads, in 8-bit products; the keys of a block share a scale."""

    arithmetic: ArithmeticRule
    block_q: int
    block_k: int


ListChoice = HeadChoice | SelectorChoice | OrderChoice
"""Choices that end in block lists."""

Choice = ListChoice | SearchChoice | DenseChoice
"""What a plan may choose at an attention site."""

BlockInput = Literal["counts", "ids", "forced", "dropped", "bias"]
"""Block lists and what is made of them: the blocks on no list, the logarithms of lengths."""


def block_input(
    captured: Captured,
    site: AttentionSite,
    choice: ListChoice,
    wanted: BlockInput,
    device: torch.device,
) -> Callable[[Sequence[Any]], Any]:
    """A function from a call's environment to one of the inputs that a choice's program reads."""
    sizes = evaluator(captured, (*choice.grid, site.tokens_q, site.tokens_k))
    blocks = (choice.block_q, choice.block_k)

    @lru_cache(maxsize=64)
    def make(frames: int, height: int, width: int, tokens_q: int, tokens_k: int) -> Any:
        with real_tensors():
            if wanted == "bias":
                return log_lengths(tokens_k, choice.block_k, None, device)
            layout = choice.geometry.layout((frames, height, width), tokens_q)
            shape = (layout, tokens_q, tokens_k, *blocks)
            if not isinstance(choice, HeadChoice):
                return block_mask(_forced(choice), *shape, choice.order).to(device)
            lists = block_lists(choice.patterns, *shape, device, choice.order)
            if wanted == "dropped":
                return dropped_bits(*lists, lists[1].shape[-1], None)
            return lists[0] if wanted == "counts" else lists[1]

    return lambda env: make(*sizes(env))


def every_block(
    captured: Captured, site: AttentionSite, choice: DenseChoice, part: int, device: torch.device
) -> Callable[[Sequence[Any]], Any]:
    """A function from a call's environment to lists of all blocks: counts, or with part 1 ids."""
    sizes = evaluator(captured, (site.tokens_q, site.tokens_k))

    @lru_cache(maxsize=64)
    def make(tokens_q: int, tokens_k: int) -> Any:
        blocks = (-(-tokens_q // choice.block_q), -(-tokens_k // choice.block_k))
        with real_tensors():
            return from_blocks(torch.ones(1, 1, *blocks, dtype=torch.bool, device=device))[part]

    return lambda env: make(*sizes(env))


def _forced(choice: SelectorChoice | OrderChoice) -> HeadPattern:
    """The static pattern that a selector's mask input holds."""
    if isinstance(choice, SelectorChoice):
        return choice.selector.keep
    assert isinstance(choice.selector, TwoMasks)  # clusters have no such input
    return choice.selector.pattern


_slots = count()


def slot_input() -> Callable[[Sequence[Any]], Any]:
    """A function from a call's environment to a number that no other selector has."""
    with real_tensors():
        number = torch.tensor(next(_slots))
    return lambda env: number
