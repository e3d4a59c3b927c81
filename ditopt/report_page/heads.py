"""The matrix of choices, layer by head and phase by phase, as plain values for the page."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ditopt.patterns import Dense, HeadPattern
from ditopt.report_page.choices import FAMILIES, Choices
from ditopt.report_page.maps import Maps, affordable, load_maps

if TYPE_CHECKING:
    from ditopt.plan import Phase, SiteRecord
    from ditopt.profiling.analysis import HeadAnalysis
    from ditopt.profiling.schema import Profile
    from ditopt.report_page.evidence import Evidence

_VIEWS: tuple[dict[str, Any], ...] = (
    {"id": "choice", "name": "Choice"},
    {"id": "density", "name": "Kept blocks", "ramp": ["none", "all of them"]},
    {"id": "error", "name": "Predicted error", "ramp": ["none", "largest here"]},
    {"id": "class", "name": "Class"},
    {"id": "verdict", "name": "Stability"},
)
_ANALYSED = ("class", "verdict")


def heads(evidence: Evidence) -> dict[str, Any] | None:
    """Everything about heads that the page's script draws; None for a model without such sites."""
    profile, plan = evidence.profile, evidence.plan
    named = set(profile.shapes)
    phases: tuple[Phase | None, ...] = (None,)
    if plan is not None:
        phases = plan.phases
        named = named.union(*({*p.attention, *p.selectors, *p.arithmetic} for p in plan.phases))
    sites = [site for site in profile.model.sites if site.id in named]
    if not sites:
        return None
    detail = affordable(profile)
    choices = Choices(profile, plan, detail.side)
    maps = load_maps(evidence.folder, profile, detail)
    shown: list[dict[str, Any]] = [
        {
            "choice": [choices.heads(site, phase) for site in sites],
            "error": [_errors(evidence, site, phase) for site in sites],
            "captured": [_captured(evidence, site, phase, maps) for site in sites],
        }
        for phase in phases
    ]
    largest = [e for phase in shown for row in phase["error"] for e in row if e is not None]
    planned, analysed = plan is not None, evidence.analysis is not None
    return {
        "planned": planned,
        "columns": max(site.heads for site in sites),
        "views": [v for v in _VIEWS if (analysed if v["id"] in _ANALYSED else planned)],
        "names": FAMILIES,
        "sites": [
            {"id": site.id, "heads": site.heads, "facts": _facts(evidence, site)} for site in sites
        ],
        "phases": shown,
        "phase_names": [_name(phase) for phase in phases],
        "choices": [asdict(choice) for choice in choices.found],
        "largest_error": max(largest, default=0.0) or 1.0,
        "maps": None if maps is None else maps.page,
    }


def _name(phase: Phase | None) -> str:
    return "dense" if phase is None else f"calls {phase.calls[0]} to {phase.calls[1] - 1}"


def _errors(evidence: Evidence, site: SiteRecord, phase: Phase | None) -> list[float | None]:
    """Relative L2 error of each head's output, over the observed calls of a phase and all seeds."""
    profile = evidence.profile
    if site.id not in profile.shapes:
        return [None] * site.heads
    calls = [
        number
        for number, call in enumerate(profile.observed_calls)
        if phase is None or phase.calls[0] <= call < phase.calls[1]
    ]
    calls = calls or list(range(len(profile.observed_calls)))
    error = torch.stack([r.squared_error[site.id][calls].sum(0) for r in evidence.records]).sum(0)
    norm = torch.stack([r.squared_norm[site.id][calls].sum(0) for r in evidence.records]).sum(0)
    rule = None if phase is None else phase.arithmetic.get(site.id)
    if rule is not None:
        if rule.kind not in profile.arithmetics:
            return [None] * site.heads
        number = profile.arithmetics.index(rule.kind)
        rounding = [r.arithmetic_error[site.id][calls, :, number] for r in evidence.records]
        error = error + torch.stack(rounding).sum((0, 1))[:, None]  # beside what is dropped
    relative = (error / norm[:, None].clamp(min=1e-30)).sqrt()
    options = [_option(evidence, site, phase, head) for head in range(site.heads)]
    return [
        None if option is None else float(f"{relative[head, option].item():.4g}")
        for head, option in enumerate(options)
    ]


def _captured(
    evidence: Evidence, site: SiteRecord, phase: Phase | None, maps: Maps | None
) -> list[list[float] | None] | None:
    """Share of the attention that each head's choice keeps, by call of the maps."""
    if maps is None or site.id not in maps.kept:
        return None
    options = [_option(evidence, site, phase, head) for head in range(site.heads)]
    kept = maps.kept[site.id]
    return [
        None if option is None else [round(float(share), 4) for share in kept[:, head, option]]
        for head, option in enumerate(options)
    ]


def _option(evidence: Evidence, site: SiteRecord, phase: Phase | None, head: int) -> int | None:
    """The number of the profile's option that a plan chose; None where it was not measured."""
    profile, plan = evidence.profile, evidence.plan
    if phase is not None and site.id in phase.selectors:
        return None
    pattern: HeadPattern = Dense()
    if phase is not None and site.id in phase.attention:
        pattern = phase.attention[site.id][head]
    told = None if phase is None else phase.remainders.get(site.id)
    remainder = "drop" if told is None else told.kind
    order = None if plan is None else plan.order
    for number, option in enumerate(profile.options):
        if option.pattern == pattern and pattern.kind == "dense":
            return number
        same_order = profile.orders[option.order] == order
        if option.pattern == pattern and option.remainder == remainder and same_order:
            return number
    return None


def _facts(evidence: Evidence, site: SiteRecord) -> list[dict[str, Any]] | None:
    """What the analysis says about each head of a site."""
    if evidence.analysis is None:
        return None
    found = evidence.analysis.sites.get(site.id)
    return None if found is None else [_fact(head) for head in found]


def _fact(head: HeadAnalysis) -> dict[str, Any]:
    pattern = FAMILIES.get(head.kind, head.kind.replace("_", " "))
    return {**head.model_dump(mode="json"), "pattern": pattern}


def left_out(profile: Profile) -> list[str]:
    """Attention sites that were not profiled and stay dense."""
    return [site.id for site in profile.model.sites if site.id not in profile.shapes]
