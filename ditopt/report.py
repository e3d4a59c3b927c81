"""What was decided and why: `Decision` for one site, `PassReport` for one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Decision:
    """One rule at one site: applied or not, and why.

    Attributes:
        site: stable site id as in the plan (`blocks.3.attn1#0`), or `"model"`.
        rule: name of the pass or rule that decided.
        applied: whether the rewrite happened.
        reason: why, in words that a user of the model understands; never empty.
        nodes: names of the graph nodes concerned.
        est_error: expected relative L2 error at the site, from the plan.
        est_saving_ms: expected saving per call of the model in milliseconds, from the plan.
    """

    site: str
    rule: str
    applied: bool
    reason: str
    nodes: tuple[str, ...] = ()
    est_error: float | None = None
    est_saving_ms: float | None = None

    def __post_init__(self) -> None:
        if not self.reason:
            raise ValueError(f"decision of {self.rule!r} at {self.site!r} has no reason")

    def to_json(self) -> dict[str, Any]:
        """The decision as plain JSON values."""
        return {**asdict(self), "nodes": list(self.nodes)}


@dataclass(frozen=True)
class PassReport:
    """One pass over one graph piece.

    Attributes:
        name: the pass's name, equal to its file name.
        piece: the piece it ran on (`prefix`, `blocks.0`, `suffix`, or `model`).
        elapsed_ms: wall-clock time of the pass, verification excluded.
        decisions: one for each site it looked at.
    """

    name: str
    piece: str
    elapsed_ms: float
    decisions: tuple[Decision, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether any rewrite happened."""
        return any(decision.applied for decision in self.decisions)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "pass": self.name,
            "piece": self.piece,
            "elapsed_ms": self.elapsed_ms,
            "modified": self.modified,
            "decisions": [decision.to_json() for decision in self.decisions],
        }


def decision_table(decisions: Iterable[Decision]) -> Table:
    """The decisions as a table for the terminal, one row each, in the order given."""
    from rich.table import Table  # only the terminal needs it
    from rich.text import Text

    table = Table("site", "rule", "applied", "reason", title="Decisions", title_justify="left")
    table.add_column("est. error", justify="right")
    table.add_column("est. saving", justify="right")
    for decision in decisions:
        table.add_row(
            Text(decision.site),  # Text: a site id such as `blocks[0]` is not markup
            Text(decision.rule),
            "yes" if decision.applied else "no",
            Text(decision.reason),
            "" if decision.est_error is None else f"{decision.est_error:.2e}",
            "" if decision.est_saving_ms is None else f"{decision.est_saving_ms:.2f} ms",
        )
    return table
