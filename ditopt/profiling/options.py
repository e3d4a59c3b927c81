"""The options of a profile, grouped by the order of tokens that one pass measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditopt.kernels.block_selection.api import select_blocks
from ditopt.kernels.block_sparse_attention.lists import to_blocks
from ditopt.patterns import Dense, HeadPattern, PooledTopK, block_mask, candidates, orders
from ditopt.profiling.schema import AttentionOption, SelectorOption
from ditopt.token_order import sequence_permutation

if TYPE_CHECKING:
    from ditopt.layout import TokenLayout
    from ditopt.plan import Block
    from ditopt.profiling.schema import Remainder
    from ditopt.token_order import TokenOrder


SELECTORS = tuple(PooledTopK(density=density) for density in (0.125, 0.25, 0.5))
"""Rules that choose blocks from the data of each call, for all heads of a site."""


@dataclass(frozen=True)
class OptionSet:
    """Dense, then every pattern of every order without its remainder, then all with means.

    Attributes:
        orders: the first is None, the model's own.
        patterns: of each order, those that are measured; dense is exact in any.
    """

    orders: tuple[TokenOrder | None, ...]
    patterns: tuple[tuple[HeadPattern, ...], ...]

    @classmethod
    def of(cls, layout: TokenLayout | None, tokens: int, block: Block) -> OptionSet:
        """What is worth measuring in sequences of so many tokens."""
        found: dict[TokenOrder | None, tuple[HeadPattern, ...]] = {}
        for order in orders(layout, block.k):
            own = candidates(layout, tokens, block.q, block.k, order)
            if order is None or own:
                found[order] = tuple(p for p in own if not isinstance(p, Dense))
        return cls(tuple(found), tuple(found.values()))

    @property
    def options(self) -> tuple[AttentionOption, ...]:
        """All of them, in the order of a profile's tensors."""
        remainders: tuple[Remainder, ...] = ("drop", "mean")
        return (
            AttentionOption(pattern=Dense()),
            *(
                AttentionOption(pattern=pattern, order=order, remainder=remainder)
                for remainder in remainders
                for order, patterns in enumerate(self.patterns)
                for pattern in patterns
            ),
        )

    def places(self, order: int) -> tuple[slice, slice]:
        """Where in `options` an order's patterns are: without remainder, and with means."""
        start = 1 + sum(len(patterns) for patterns in self.patterns[:order])
        stop = start + len(self.patterns[order])
        count = sum(len(patterns) for patterns in self.patterns)
        return slice(start, stop), slice(start + count, stop + count)

    def masks(self, order: int, layout: TokenLayout | None, tokens: int, block: Block) -> Tensor:
        """Blocks that an order's patterns keep, bool [C, QB, KB]."""
        sizes = (layout, tokens, tokens, block.q, block.k, self.orders[order])
        return torch.stack([block_mask(pattern, *sizes) for pattern in self.patterns[order]])

    def permutation(self, order: int, layout: TokenLayout | None, tokens: int) -> Tensor | None:
        """Tokens in an order, int64 [N]; None for the model's own."""
        kind = self.orders[order]
        if kind is None or layout is None:
            return None
        return torch.from_numpy(sequence_permutation(kind, layout.fit(tokens)).copy())

    @property
    def selectors(self) -> tuple[SelectorOption, ...]:
        """Without remainder, then with means; none where no pattern has a place."""
        remainders: tuple[Remainder, ...] = ("drop", "mean")
        return tuple(
            SelectorOption(selector=selector, remainder=remainder)
            for remainder in remainders
            for selector in SELECTORS
            if any(self.patterns)
        )


def selected_blocks(
    q: Tensor, k: Tensor, layout: TokenLayout | None, block: Block, scale: float
) -> Tensor:
    """Blocks that `SELECTORS` choose for q, k [B, H, N, D]: bool [B, H, S, QB, KB]."""
    key_blocks = -(-k.shape[2] // block.k)
    found = []
    for selector in SELECTORS:
        forced = None
        if layout is not None:
            sizes = (q.shape[2], k.shape[2], block.q, block.k)
            forced = block_mask(selector.keep, layout, *sizes).to(q.device)
        lists = select_blocks(
            *(q, k),
            block_q=block.q,
            block_k=block.k,
            rule="top_k",
            amount=selector.density,
            minimum=selector.minimum,
            forced=forced,
            scale=scale,
        )
        found.append(to_blocks(*lists, key_blocks))
    return torch.stack(found, 2)
