"""What ditopt sees in a model: graphs, pieces, attention and linear sites; compiles nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ditopt.errors import WorkloadError
from ditopt.torch_backend import Compiled, compiled_graphs

if TYPE_CHECKING:
    from rich.console import Group

    from ditopt.plan import Plan
    from ditopt.quantization.table import LinearRow
    from ditopt.report import Decision
    from ditopt.workload import Workload


class _Enough(BaseException):
    """Ends a sampling loop after its first call; no Exception, so that no sampler swallows it."""


@dataclass(frozen=True)
class InspectReport:
    """The graphs of each denoiser of a workload."""

    graphs: Mapping[str, list[Compiled]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; symbolic sizes as text."""
        return {
            "models": {
                name: [_graph_json(g) for g in graphs] for name, graphs in self.graphs.items()
            }
        }

    def table(self) -> Group:
        """Tables for the terminal."""
        from rich.console import Group
        from rich.table import Table

        parts: list[Any] = []
        for name, graphs in self.graphs.items():
            sites = Table(title=f"{name}: attention sites", title_justify="left")
            for column in ("site", "kind", "form", "heads", "head size", "queries", "keys", "mask"):
                sites.add_column(column)
            linear = Table(title=f"{name}: linear sites", title_justify="left")
            for column in ("site", "in", "out"):
                linear.add_column(column)
            for graph in graphs:
                for s in graph.attention:
                    sizes = (s.heads, s.head_dim, s.tokens_q, s.tokens_k)
                    sites.add_row(s.id, s.kind, s.form, *map(str, sizes), s.mask.replace("_", " "))
                for layer in graph.linear:
                    linear.add_row(layer.id, str(layer.in_features), str(layer.out_features))
            parts += [sites, linear, *(_summary(graph) for graph in graphs)]
            if len(graphs) > 1:
                parts.append(
                    f"{len(graphs)} graphs: the model breaks while it is captured, so whole-model "
                    "choices (step caching) are lost, and choices per layer hold only where a "
                    "graph names its layer."
                )
        return Group(*parts)


def inspect_workload(workload: Workload) -> InspectReport:
    """Capture the first call of each denoiser of a workload."""
    return InspectReport(_first_calls(workload, None))


@dataclass(frozen=True)
class Explanation:
    """What a plan does to a workload's models.

    Attributes:
        decisions: all of them in order.
        linears: the linear layers; empty for a plan that names no format.
    """

    decisions: list[Decision]
    linears: list[LinearRow]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "decisions": [decision.to_json() for decision in self.decisions],
            "linears": [row.to_json() for row in self.linears],
        }

    def table(self) -> Group:
        """Tables for the terminal."""
        from rich.console import Group

        from ditopt.quantization.table import linear_table
        from ditopt.report import decision_table

        parts = [decision_table(self.decisions)]
        return Group(*parts, *([linear_table(self.linears)] if self.linears else []))


def explain(workload: Workload, plan: Plan) -> list[Decision]:
    """Every decision of compiling a workload's model with a plan."""
    return explain_fully(workload, plan).decisions


def explain_fully(workload: Workload, plan: Plan) -> Explanation:
    """Every decision, and every linear layer where the plan names formats.

    The reference kernels run the model for one call.
    """
    from ditopt.quantization.table import linear_rows

    graphs = _first_calls(workload, plan)
    named = any(phase.linear for phase in plan.phases)
    return Explanation(
        [d for records in graphs.values() for record in records for d in record.decisions],
        [
            row
            for name, records in graphs.items()
            for record in records
            for row in linear_rows(workload.models[name], record)
            if named
        ],
    )


def _first_calls(workload: Workload, plan: Plan | None) -> dict[str, list[Compiled]]:
    options = {"plan": plan} if plan is not None else {}
    found: dict[str, list[Compiled]] = {}
    for name, model in workload.models.items():
        found[name] = _capture_one(workload, name, model, options)
    return found


def _capture_one(
    workload: Workload, name: str, model: nn.Module, options: dict[str, Any]
) -> list[Compiled]:
    torch.compiler.reset()
    seen = len(compiled_graphs(model))
    compiled = torch.compile(model, backend="ditopt_eager", options=options)

    def once(*args: Any, **kwargs: Any) -> Any:
        compiled(*args, **kwargs)
        raise _Enough

    models = {key: (once if key == name else module) for key, module in workload.models.items()}
    try:
        workload.run(0, models)
    except _Enough:
        return compiled_graphs(model)[seen:]
    raise WorkloadError(
        f"the sampling loop never called {name!r}",
        remedy="sample(model, seed) must call the model that it is given.",
    )


def _graph_json(graph: Compiled) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value if isinstance(value, (int, str, float)) else str(value)

    return {
        "grid": None if graph.grid is None else [plain(size) for size in graph.grid],
        "pieces": [{"kind": kind, "path": path} for kind, path in graph.pieces],
        "attention": [
            {key: plain(value) for key, value in vars(site).items()} for site in graph.attention
        ],
        "linear": [
            {key: plain(value) for key, value in vars(site).items()} for site in graph.linear
        ],
        "decisions": [decision.to_json() for decision in graph.decisions],
    }


def _summary(graph: Compiled) -> str:
    kinds = Counter(kind for kind, _ in graph.pieces)
    pieces = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    grid = "unknown" if graph.grid is None else " x ".join(str(size) for size in graph.grid)
    notes = "".join(f"\n  {d.site}: {d.reason}" for d in graph.decisions if not d.applied)
    return (
        f"pieces: {pieces}; {graph.programs} programs; "
        f"token grid (frames x rows x columns): {grid}{notes}"
    )
