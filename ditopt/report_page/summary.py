"""The head of a report: what came out, in one sentence and a few numbers."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditopt.report_page.decisions import EQUAL_DB, Quality

if TYPE_CHECKING:
    from ditopt.plan import Goal, Plan, Verification
    from ditopt.report_page.evidence import Evidence


@dataclass(frozen=True)
class Tile:
    """One number with its name and what has to be known about it."""

    name: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True)
class Summary:
    """The head of the page.

    Attributes:
        title: what came out.
        lead: the same as a sentence.
        tiles: the numbers.
        facts: terms and texts about where and how.
    """

    title: str
    lead: str
    tiles: tuple[Tile, ...]
    facts: tuple[tuple[str, str], ...]


def summary(evidence: Evidence) -> Summary:
    """Title, numbers and facts of a profile and its plan."""
    facts = tuple(_facts(evidence))
    plan = evidence.plan
    if plan is None:
        name = evidence.profile.model.name
        lead = "What was measured along the denoising loop. There is no plan in this report yet."
        return Summary(f"Profile of {name}", lead, tuple(_profile_tiles(evidence)), facts)
    audit = audited(evidence)
    measured = measured_speedup(evidence)
    predicted = None if plan.predicted is None else plan.predicted.speedup
    speedup = measured or predicted
    title = f"Plan for {plan.model.name}"
    if speedup is not None:
        sure = "" if measured is not None else " (predicted)"
        quality = ", not verified" if audit is None else f" at {audit.mean:.1f} dB"
        if audit is not None and audit.mean >= EQUAL_DB:
            quality = ", equal up to rounding"
        title = f"{speedup:.2f}× as fast{sure}{quality}"
    said = [] if predicted is None else [f"Predicted {predicted:.2f}× the speed of dense sampling"]
    if said and measured is not None:
        said.append(f"measured {measured:.2f}×")
    lead = ", ".join(said)
    if audit is not None:
        goal = "" if plan.goal is None else f"; the goal was {_words(plan.goal)}"
        lead += f"{'. ' if lead else ''}On fresh seeds the PSNR is {audit.mean:.1f} dB{goal}"
    lead = f"{lead}." if lead else "A plan written by hand: nothing was predicted or measured."
    return Summary(title, lead, tuple(_plan_tiles(evidence, audit, measured)), facts)


def audited(evidence: Evidence) -> Quality | None:
    """Quality of the adopted plan on fresh seeds; None where it was not audited."""
    if evidence.plan is None:
        return None
    audits = _audits(evidence.plan)
    return Quality.of(audits[-1].psnr_db) if audits else None


def _audits(plan: Plan) -> list[Verification]:
    return [v for v in plan.verification if v.purpose == "audit" and v.adopted]


def measured_speedup(evidence: Evidence) -> float | None:
    """Dense time over the plan's, by sampling; None where it was not measured for this plan."""
    plan, search = evidence.plan, evidence.search
    if plan is None:
        return None
    told = [v.speedup for v in plan.verification if v.adopted and v.speedup is not None]
    if told:
        return told[-1]
    if search is None or plan.predicted is None or not evidence.about_this_plan:
        return None
    seconds = [trial.measured_seconds for trial in search.trials if trial.adopted]
    dense = plan.predicted.seconds * plan.predicted.speedup
    return dense / statistics.median(seconds) if seconds else None


def _plan_tiles(evidence: Evidence, audit: Quality | None, measured: float | None) -> list[Tile]:
    plan = evidence.plan
    assert plan is not None
    tiles = []
    if plan.predicted is not None:
        note = f"{plan.predicted.seconds:.3g} s for one loop"
        tiles.append(Tile("Predicted speedup", f"{plan.predicted.speedup:.2f}", "×", note))
    note = "dense loop over the plan's" if measured else "ditopt bench measures it"
    tiles.append(
        Tile(
            "Measured speedup",
            f"{measured:.2f}" if measured else "–",
            "×" if measured else "",
            note,
        )
    )
    if audit is not None:
        note = f"minimum {audit.low:.1f}, 10th percentile {audit.p10:.1f}"
        tiles.append(Tile("Audit PSNR", f"{audit.mean:.1f}", "dB", note))
    ssim = [v.mean_ssim for v in _audits(plan) if v.mean_ssim is not None]
    if ssim:
        tiles.append(Tile("Audit SSIM", f"{ssim[-1]:.3f}", "", "mean over the same seeds"))
    full = plan.sampler.calls if plan.cache is None else len(plan.cache.full)
    tiles.append(
        Tile("Full calls", f"{full}", f"of {plan.sampler.calls}", "the others are forecast")
    )
    if plan.predicted is not None:
        note = "of attention, in the last phase"
        tiles.append(Tile("Kept blocks", f"{100 * plan.predicted.density:.0f}", "%", note))
    layers = {layer for phase in plan.phases for layer in phase.linear}
    if layers:
        note = f"of {len(plan.model.linears)} in another number format"
        tiles.append(Tile("Linear layers", f"{len(layers)}", "", note))
    return tiles


def _profile_tiles(evidence: Evidence) -> list[Tile]:
    profile, costs = evidence.profile, evidence.profile.costs
    heads = sum(shape.heads for shape in profile.shapes.values())
    tiles = [
        Tile("Sites", f"{len(profile.shapes)}", "", f"{heads} heads of attention"),
        Tile("Options", f"{len(profile.options)}", "", "tried at every head"),
        Tile("Seeds", f"{len(profile.seeds)}", "", f"{len(profile.observed_calls)} calls observed"),
    ]
    if costs is not None:
        loop = costs.dense_call_ms * profile.sampler.calls * profile.sampler.branches / 1e3
        tiles.append(Tile("Dense loop", f"{loop:.3g}", "s", f"{costs.source} on this hardware"))
    return tiles


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    profile, plan = evidence.profile, evidence.plan
    sampler, where = profile.sampler, profile.hardware
    branches = f", {sampler.branches} guidance branches" if sampler.branches > 1 else ""
    costs = "" if profile.costs is None else f"; costs {profile.costs.source}"
    facts = [
        ("Model", f"{profile.model.name}, {len(profile.model.sites)} attentions"),
        ("Sampler", f"{sampler.calls} calls{branches}"),
        ("Hardware", f"{where.name} ({where.device}, {where.threads} threads){costs}"),
        (
            "Versions",
            f"torch {where.torch}, profile {profile.ditopt_profile}"
            + ("" if plan is None else f", plan {plan.ditopt_plan}"),
        ),
    ]
    if profile.layout is not None:
        grid = profile.layout
        text = f", {grid.text} text tokens" if grid.text else ""
        facts.append(("Tokens", f"{grid.frames} × {grid.height} × {grid.width}{text}"))
    facts.append(("Blocks", f"{profile.block.q} × {profile.block.k} tokens"))
    if plan is not None:
        facts.append(("Goal", "none was stated" if plan.goal is None else _words(plan.goal)))
        order = "as the model lays them out" if plan.order is None else plan.order.kind
        facts.append(("Token order", order.replace("_", " ")))
    if profile.source is not None:
        facts.append(("Workload", re.split(r"[\\/]", profile.source)[-1]))
    return facts


def _words(goal: Goal) -> str:
    return str(goal).replace(">=", "≥").replace("<=", "≤")
