"""Every linear layer of a compiled model: format, what computes it, bytes, or why it was left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ditopt.quantization.layer import ROW_FORMATS
from ditopt.quantization.limits import missing_hardware

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from ditopt.quantization import LinearRule
    from ditopt.torch_backend import Compiled

_LEFT = "the plan names no format"


@dataclass(frozen=True)
class LinearRow:
    """One layer under one rule.

    Attributes:
        site: its id.
        rows: tokens of all samples, as text where the capture is symbolic.
        in_features, out_features: K and N.
        format: of the plan; empty where the layer was left alone.
        transform: of the plan.
        operator: what multiplies on this device; "simulated" is part of it where that is so.
        bytes_before: of the model's weight.
        bytes_after: of what the program reads instead, as measured; the layer's share by output
            channels where several are merged.
        reason: why it was left alone; else what the pass said.
    """

    site: str
    rows: int | str
    in_features: int
    out_features: int
    format: str
    transform: str
    operator: str
    bytes_before: int
    bytes_after: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def linear_rows(model: nn.Module, graph: Compiled) -> list[LinearRow]:
    """The layers of one compiled graph in execution order, after its first call.

    A layer that several phases treat differently has a row for each format.
    """
    parameters = dict(model.named_parameters())
    reasons: dict[str, list[str]] = {}
    for decision in graph.decisions:
        if decision.rule == "quantize_linears":
            reasons.setdefault(decision.site, []).append(decision.reason)
    found = []
    for site in graph.linear:
        weight = parameters.get(f"{site.id}.weight")
        size = site.in_features * site.out_features
        before = weight.nbytes if weight is not None and weight.numel() == size else 0
        rows = site.rows if isinstance(site.rows, int) else str(site.rows)
        place = (site.id, rows, site.in_features, site.out_features)
        told = "; ".join(reasons.get(site.id, [_LEFT]))
        made = graph.derived.quantized(site.weight) if graph.derived is not None else []
        for rule, tensors, merged in made:
            share = site.out_features / merged if merged else 1.0
            after = round(tensors.nbytes * share)
            what = (rule.format, rule.transform, _operator(rule, weight))
            found.append(LinearRow(*place, *what, before, after, told))
        if not made:
            found.append(LinearRow(*place, "", "", "linear", before, before, told))
    return found


def _operator(rule: LinearRule, weight: Tensor | None) -> str:
    row = ROW_FORMATS.get(rule.product or "")
    if row is None or weight is None:
        return "linear" if rule.format == "none" else "decode, then linear"
    operator = row.operator(native=missing_hardware(rule.product, weight.device) is None)
    return operator if rule.activation == "none" else f"decode, then {operator}"


def totals(rows: Iterable[LinearRow]) -> Mapping[str, float]:
    """Bytes of the quantized layers before and after, and their ratio; layers count once."""
    chosen = {row.site: row for row in rows if row.format}
    before = sum(row.bytes_before for row in chosen.values())
    after = sum(row.bytes_after for row in chosen.values())
    return {"before": before, "after": after, "ratio": before / after if after else 1.0}


def linear_table(rows: Iterable[LinearRow]) -> Table:
    """For the terminal."""
    from rich.table import Table  # only the terminal needs it
    from rich.text import Text

    table = Table(title="Linear layers", title_justify="left")
    columns = ("site", "M x K x N", "format", "transform", "operator", "bytes", "reason")
    for column in columns:
        table.add_column(column)
    for row in rows:
        sizes = f"{row.rows} x {row.in_features} x {row.out_features}"
        moved = f"{row.bytes_before:,} -> {row.bytes_after:,}" if row.format else ""
        cells = (row.site, sizes, row.format, row.transform, row.operator, moved, row.reason)
        table.add_row(*map(Text, cells))
    return table
