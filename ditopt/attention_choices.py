"""What a plan says at the attention sites of one captured graph, or why it cannot be done there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditopt.infer_layout import site_geometry
from ditopt.patterns import Clusters, Hierarchical, TwoMasks
from ditopt.plan.schema import LinearRemainder, remainder_tensor
from ditopt.report import Decision
from ditopt.site_inputs import (
    BlockMeans,
    Choice,
    DenseChoice,
    HeadChoice,
    LinearPart,
    OrderChoice,
    Remainder,
    SearchChoice,
    SelectorChoice,
)
from ditopt.symbols import is_symbolic

if TYPE_CHECKING:
    from ditopt.capture import Captured
    from ditopt.config import Options
    from ditopt.infer_layout import Grid
    from ditopt.patterns import BlockSelector
    from ditopt.plan import Plan
    from ditopt.plan.schema import Phase
    from ditopt.sites import AttentionSite
    from ditopt.torch_backend import Compiled


class AttentionChoices:
    """Choices of one plan for one graph.

    Args:
        plan: what to choose.
        captured: the graph.
        record: its sites and token grid; a decision is added to it where lists cannot be kept.
        options: of the `torch.compile` call.
    """

    def __init__(self, plan: Plan, captured: Captured, record: Compiled, options: Options) -> None:
        self._plan, self._captured = plan, captured
        self._record, self._options = record, options

    def of(self, phase: Phase) -> dict[str, Choice | str]:
        """For each site that the phase names, its choice, or why it cannot be used here."""
        named = {*phase.attention, *phase.selectors, *phase.arithmetic}
        return {
            site.id: self._choice(site, phase)
            for site in self._record.attention
            if site.id in named
        }

    def keep_lists(self) -> bool:
        """Whether selectors keep something from call to call; says where they cannot."""
        selectors = [s for phase in self._plan.phases for s in phase.selectors.values()]
        wanted = any(getattr(selector, "refresh", 1) > 1 for selector in selectors)
        if wanted and self._options.cuda_graphs:
            reason = "a CUDA graph does the same work at every call: blocks are chosen at every one"
            self._record.decisions.append(Decision("model", "keep_lists", False, reason))
            wanted = False
        return wanted or any(isinstance(selector, Clusters) for selector in selectors)

    def _choice(self, site: AttentionSite, phase: Phase) -> Choice | str:
        plan, captured = self._plan, self._captured
        if captured.prefix:
            return (
                f"a graph break makes {captured.prefix} a graph of its own, "
                "which equal modules share"
            )
        arithmetic = phase.arithmetic.get(site.id)
        if arithmetic is not None and site.id not in phase.attention:
            return DenseChoice(arithmetic, plan.block.q, plan.block.k)
        grid = grid_of(plan, self._record)
        if self._record.grid is None and grid is not None and is_symbolic(site.tokens_q):
            return (
                "the plan knows the token grid of one resolution, and this graph serves several; "
                "compile with dynamic=False"
            )
        if grid is None:
            return "the token grid is unknown"
        geometry = site_geometry(captured, site, grid)
        if isinstance(geometry, str):
            return geometry
        remainder = _remainder(plan, site, phase)
        if isinstance(remainder, str):
            return remainder
        place = (geometry, grid, plan.block.q, plan.block.k, plan.order, remainder)
        selector = phase.selectors.get(site.id)
        if isinstance(selector, Hierarchical):
            return SearchChoice(selector, geometry, grid, plan.order)
        if isinstance(selector, (Clusters, TwoMasks)):
            return OrderChoice(selector, *place)
        if selector is not None:
            return SelectorChoice(self._refreshed(selector), *place)
        return HeadChoice(tuple(phase.attention[site.id]), *place, arithmetic)

    def _refreshed(self, selector: BlockSelector) -> BlockSelector:
        """A selector whose lists may be kept here."""
        if selector.refresh == 1 or not self._options.cuda_graphs:
            return selector
        return selector.model_copy(update={"refresh": 1})


def grid_of(plan: Plan, record: Compiled) -> Grid | None:
    """Frames, rows and columns of the graph's tokens; the plan's where they cannot be inferred."""
    if record.grid is not None or plan.layout is None:
        return record.grid
    return plan.layout.frames, plan.layout.height, plan.layout.width


def _remainder(plan: Plan, site: AttentionSite, phase: Phase) -> Remainder | str | None:
    """What stands for the blocks that a site leaves out, or why it cannot."""
    rule = phase.remainders.get(site.id)
    if rule is None:
        return None
    if not isinstance(rule, LinearRemainder):
        return BlockMeans()
    projection = plan.tensors.get(remainder_tensor(site.id))
    if projection is None:
        return f"the plan's side file lacks {remainder_tensor(site.id)!r}"
    return LinearPart(rule.phi, projection)
