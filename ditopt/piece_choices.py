"""What a plan chooses at the attentions of a piece: key of its program, context of its passes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditopt.executors import DENSE, choose_executors
from ditopt.passes.base import (
    ArithmeticChoice,
    ClusterChoice,
    HierarchicalChoice,
    OnlineChoice,
    PassContext,
    RemainderChoice,
    SparseChoice,
    VoteChoice,
)
from ditopt.patterns import TwoMasks
from ditopt.site_inputs import (
    BlockMeans,
    Choice,
    DenseChoice,
    HeadChoice,
    LinearPart,
    ListChoice,
    OrderChoice,
    SearchChoice,
    SelectorChoice,
)

if TYPE_CHECKING:
    from torch import fx

    from ditopt.config import Options
    from ditopt.kernels.block_sparse_attention.dispatch import Choice as Executor
    from ditopt.quantization import LinearRule
    from ditopt.sites import AttentionSite


@dataclass(frozen=True)
class PieceChoices:
    """By node name.

    Attributes:
        sites: the piece's attentions.
        choices: what the plan asks for, where attention is not dense.
        executors: of block-sparse attentions, those that turned out dense included.
        declined: wishes that cannot be met, with the reason.
        reordered: attentions that put their tokens in order by themselves, and why.
    """

    sites: Mapping[str, AttentionSite]
    choices: Mapping[str, Choice]
    executors: Mapping[str, Executor]
    declined: Mapping[str, str]
    reordered: Mapping[str, str]

    @classmethod
    def of(
        cls,
        nodes: Iterable[fx.Node],
        sites: Mapping[str, AttentionSite],
        wishes: Mapping[str, Choice | str],
        why_apart: str | None,
    ) -> PieceChoices:
        """The wishes of a phase, by site id, at the piece with `nodes`.

        `why_apart` says why its tokens are not in the plan's order already; None where they are.
        """
        nodes = list(nodes)
        choices: dict[str, Choice] = {}
        declined: dict[str, str] = {}
        for node in nodes:
            wish = wishes.get(sites[node.name].id) if node.name in sites else None
            if isinstance(wish, str):
                declined[node.name] = wish
            elif wish is not None:
                choices[node.name] = wish
        listed = {n: c for n, c in choices.items() if isinstance(c, ListChoice)}
        executors = choose_executors(nodes, listed)
        for name, executor in executors.items():
            if executor.executor in DENSE:
                dense = choices.pop(name)
                if isinstance(dense, HeadChoice) and dense.arithmetic is not None:
                    choices[name] = DenseChoice(dense.arithmetic, dense.block_q, dense.block_k)
        reordered = {
            name: f"tokens in {choice.order.kind} order around this attention: {why_apart}"
            for name, choice in choices.items()
            if not isinstance(choice, DenseChoice)
            and choice.order is not None
            and why_apart is not None
        }
        return cls(sites, choices, executors, declined, reordered)

    @property
    def key(self) -> Hashable:
        """Equal where the program is: rules are written into it, lists and patterns passed in."""
        rules = frozenset(
            (name, None if isinstance(choice, (HeadChoice, DenseChoice)) else choice.selector)
            for name, choice in self.choices.items()
        )
        lowered = frozenset(
            (name, e.executor, e.dense_heads)
            for name, e in self.executors.items()
            if e.executor not in DENSE
        )
        further = (self._means(), *(frozenset(x.items()) for x in self._further()))
        return rules, lowered, frozenset(self.reordered), frozenset(self.declined), further

    def context(
        self, options: Options, linear: Mapping[str, LinearRule | str], own: frozenset[int]
    ) -> PassContext:
        """What the passes may know."""
        sparse, online, orders, hierarchical = {}, {}, {}, {}
        for name, choice in self.choices.items():
            if isinstance(choice, HeadChoice):
                sparse[name] = self._sparse(name, choice)
            elif isinstance(choice, SelectorChoice):
                online[name] = self._online(name, choice)
            elif isinstance(choice, OrderChoice):
                orders[name] = self._order(name, choice)
            elif isinstance(choice, SearchChoice):
                hierarchical[name] = self._hierarchical(name, choice)
        remainders, arithmetic = self._further()
        return PassContext(
            options=options,
            sparse=sparse,
            online=online,
            orders=orders,
            hierarchical=hierarchical,
            reordered=self.reordered,
            declined=self.declined,
            means=self._means(),
            remainders=remainders,
            arithmetic=arithmetic,
            linear=linear,
            own=own,
        )

    def _means(self) -> frozenset[str]:
        return frozenset(
            name
            for name, choice in self.choices.items()
            if isinstance(choice, ListChoice)
            and isinstance(choice.remainder, BlockMeans)
            and _leaves_out(choice)
        )

    def _further(self) -> tuple[dict[str, RemainderChoice], dict[str, ArithmeticChoice]]:
        """What is done to the attentions beside their lists."""
        remainders, arithmetic = {}, {}
        for name, choice in self.choices.items():
            if isinstance(choice, ListChoice) and isinstance(choice.remainder, LinearPart):
                shape = tuple(choice.remainder.projection.shape)
                remainders[name] = RemainderChoice(choice.remainder.phi, shape)
            if isinstance(choice, (HeadChoice, DenseChoice)) and choice.arithmetic is not None:
                rule, blocks = choice.arithmetic, (choice.block_q, choice.block_k)
                listed = isinstance(choice, HeadChoice)
                arithmetic[name] = ArithmeticChoice(rule.kind, rule.simulate, *blocks, listed)
        return remainders, arithmetic

    def _sparse(self, name: str, choice: HeadChoice) -> SparseChoice:
        site, executor = self.sites[name], self.executors[name]
        blocks, sizes = (choice.block_q, choice.block_k), (site.tokens_q, site.tokens_k)
        return SparseChoice(
            *blocks, len(choice.patterns), *sizes, executor.executor, executor.dense_heads
        )

    def _online(self, name: str, choice: SelectorChoice) -> OnlineChoice:
        site = self.sites[name]
        rule = (*choice.selector.rule, choice.selector.minimum)
        sizes = (choice.block_q, choice.block_k, site.heads, site.tokens_q, site.tokens_k)
        kept = (choice.selector.scores, choice.selector.refresh)
        return OnlineChoice(*rule, *sizes, self.executors[name].executor, *kept)

    def _order(self, name: str, choice: OrderChoice) -> ClusterChoice | VoteChoice:
        site, executor = self.sites[name], self.executors[name].executor
        place = (choice.block_q, choice.block_k, site.heads)
        selector = choice.selector
        if isinstance(selector, TwoMasks):
            return VoteChoice(*place, selector.samples, site.tokens_q, site.tokens_k, executor)
        counts = ((selector.queries, selector.keys), (selector.first, selector.later))
        amounts = (selector.mass, selector.least)
        return ClusterChoice(*place, *counts, *amounts, self._text(name, choice), executor)

    def _hierarchical(self, name: str, choice: SearchChoice) -> HierarchicalChoice:
        site = self.sites[name]
        settings = (choice.selector.top_k, choice.selector.coarse)
        return HierarchicalChoice(*settings, site.heads, site.tokens_q, self._text(name, choice))

    def _text(self, name: str, choice: OrderChoice | SearchChoice) -> Any:
        """Tokens of a sequence that are not of the grid."""
        frames, height, width = choice.grid
        tokens = self.sites[name].tokens_q
        return tokens - frames * height * width if choice.geometry.part == "grid" else 0


def _leaves_out(choice: ListChoice) -> bool:
    """Whether some head may leave a block out."""
    return not isinstance(choice, HeadChoice) or any(p.kind != "dense" for p in choice.patterns)
