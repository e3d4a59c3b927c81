"""Plans that say one thing about many linear layers, written without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ditopt import fingerprint
from ditopt.plan import LinearRecord, ModelRecord, Phase, Plan, Sampler, SiteRecord
from ditopt.profiling.run import describe_hardware
from ditopt.symbols import hint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ditopt.quantization import LinearRule
    from ditopt.sites import LinearSite
    from ditopt.torch_backend import Compiled

MIN_ROWS = 1024
"""Fewer tokens are bound by reading the weight or by launching; modulation layers have a few."""


def candidates(graph: Compiled, *, min_rows: int = MIN_ROWS) -> list[LinearSite]:
    """Layers that are worth a format: in the blocks, many tokens, a weight of their own.

    Embedders, modulation and the last projection stay as they are: they hold little of the time and
    much of the quality.
    """
    return [
        site
        for site in graph.linear
        if graph.pieces[site.piece][0] == "block"
        and site.weight is not None
        and hint(site.rows) >= min_rows
    ]


def uniform_plan(
    model: nn.Module,
    graph: Compiled,
    rule: LinearRule,
    sites: Sequence[LinearSite],
    *,
    calls: int = 1,
    statistics: Mapping[str, Tensor] | None = None,
    sampler: Mapping[str, Any] | None = None,
) -> Plan:
    """One rule for all given layers at every call.

    Args:
        model: the model.
        graph: what an earlier compilation of it recorded.
        rule: for the layers.
        sites: the layers.
        calls: of one sampling loop.
        statistics: tensors `linear/<name>/<layer>` for transforms.
        sampler: further fields of the plan's sampler.
    """
    softmax = (site for site in graph.attention if site.form == "softmax")
    plan = Plan(
        model=ModelRecord(
            architecture=fingerprint.architecture(model),
            weights=fingerprint.weights(model),
            name=type(model).__name__,
            sites=tuple(
                SiteRecord(id=s.id, kind=s.kind, heads=s.heads, head_dim=s.head_dim)
                for s in softmax
            ),
            linears=linear_records(graph.linear),
        ),
        sampler=Sampler(calls=calls, **(sampler or {})),
        hardware=describe_hardware(next(model.parameters()).device),
        phases=(Phase(calls=(0, calls), linear={site.id: rule for site in sites}),),
    )
    return plan.with_tensors(statistics) if statistics else plan


def linear_records(sites: Sequence[LinearSite]) -> tuple[LinearRecord, ...]:
    """The layers as a plan records them, each once."""
    found = {
        site.id: LinearRecord(
            id=site.id, in_features=site.in_features, out_features=site.out_features
        )
        for site in sites
    }
    return tuple(found.values())
