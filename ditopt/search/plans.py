"""A candidate of the search as a plan, not verified yet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ditopt.plan import Goal, Phase, Plan, Predicted
from ditopt.plan.schema import MeanRemainder
from ditopt.search.exchange import cache_section

if TYPE_CHECKING:
    from ditopt.quantization import LinearRule
    from ditopt.search.calibration import ErrorModel
    from ditopt.search.prediction import Candidate, Predictor


def plan_of(
    candidate: Candidate, predictor: Predictor, model: ErrorModel, goal: Goal | None
) -> Plan:
    """The candidate as a plan: formats at every call, sparse attention after the dense calls."""
    profile, linears = predictor.profile, predictor.linears
    sites = predictor.sites(candidate.start, candidate.order, candidate.schedule)
    choices = candidate.assignment.choices
    rules, means = predictor.attention.rules(choices, sites)
    arithmetic = predictor.attention.arithmetic(choices, sites)
    linear: dict[str, LinearRule] = {}
    model_record = profile.model
    if linears is not None:
        linear = linears.rules(choices, sites)
        update = {"linears": linears.profile.records}
        model_record = profile.model.model_copy(update=update)
    calls = profile.sampler.calls
    phases = [
        Phase(calls=(0, candidate.start), linear=linear),
        Phase(
            calls=(candidate.start, calls),
            attention=rules,
            remainders=dict.fromkeys(means, MeanRemainder()),
            arithmetic=arithmetic,
            linear=linear,
        ),
    ]
    psnr_db = model.psnr_db(candidate.energies)
    plan = Plan(
        model=model_record,
        sampler=profile.sampler,
        hardware=profile.hardware,
        goal=goal,
        layout=profile.layout,
        block=profile.block,
        order=profile.orders[candidate.order] if rules else None,
        phases=tuple(phases) if rules or arithmetic else (Phase(calls=(0, calls), linear=linear),),
        cache=cache_section(candidate.schedule),
        predicted=Predicted(
            seconds=candidate.seconds,
            speedup=predictor.dense_seconds / candidate.seconds,
            psnr_db=None if math.isinf(psnr_db) else psnr_db,
            ssim=None if math.isinf(psnr_db) else model.ssim(candidate.energies),
            bytes=candidate.bytes,
            density=predictor.attention.density(choices, sites),
        ),
    )
    tensors = linears.tensors(linear) if linears is not None else {}
    return plan.with_tensors(tensors) if tensors else plan
