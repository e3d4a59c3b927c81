"""The correctness gate of a bench: what each variant owes, and which one fails it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditopt.metrics import QualitySummary
    from ditopt.plan import Plan

NOISE_FACTOR_DB = 20 * math.log10(2)
"""Exact rewrites may be twice as far from eager as `torch.compile`: fusion moves rounding."""

ROUNDING_8_BIT_DB = 10 * math.log10(12 * 255**2)
"""PSNR of rounding to 8 bits (58.9 dB): above it no picture shows a difference."""


def gate(
    quality: Mapping[str, QualitySummary], plan: Plan | None, engine_plan: Plan | None
) -> list[str]:
    """What is wrong with the results, in words; empty when all is well.

    `ditopt`, and an engine that was exported without a plan, must be lossless; what runs a plan,
    be it compiled or an engine, must meet the plan's goal.

    Args:
        quality: of each variant that ran; `inductor` is the measure of losslessness.
        plan: of the variant `ditopt+plan`.
        engine_plan: that the variant `engine` was exported with.
    """
    plans = {"ditopt": None, "ditopt+plan": plan, "engine": engine_plan}
    failures = []
    for name, its_plan in plans.items():
        if name not in quality:
            continue
        reached = quality[name].mean_psnr_db
        if its_plan is None and name != "ditopt+plan":
            failures += _lossless(name, reached, quality.get("inductor"))
        goal = its_plan.goal.min_psnr_db if its_plan is not None and its_plan.goal else None
        if goal is not None and reached < goal:
            whose = "it" if name == "ditopt+plan" else f"the {name}"
            failures.append(f"the plan's goal is {goal:g} dB, but {whose} reaches {reached:.2f} dB")
    return failures


def _lossless(name: str, reached: float, inductor: QualitySummary | None) -> list[str]:
    if inductor is None:
        return []
    floor = inductor.mean_psnr_db
    needed = min(floor - NOISE_FACTOR_DB, ROUNDING_8_BIT_DB)
    if reached >= needed:
        return []
    return [
        f"{name} without a plan must be lossless, but is at {reached:.1f} dB "
        f"(torch.compile: {floor:.1f} dB, needed: {needed:.1f} dB)"
    ]
