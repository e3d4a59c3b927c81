"""The plan: data that names every choice, readable by people and checked before it is used."""

from ditopt.plan.plan import Plan
from ditopt.plan.records import (
    Goal,
    Hardware,
    LinearRecord,
    ModelRecord,
    Predicted,
    Sampler,
    SideFile,
    SiteRecord,
    Verification,
)
from ditopt.plan.schema import Block, Cache, Gate, Phase

__all__ = [
    "Block",
    "Cache",
    "Gate",
    "Goal",
    "Hardware",
    "LinearRecord",
    "ModelRecord",
    "Phase",
    "Plan",
    "Predicted",
    "Sampler",
    "SideFile",
    "SiteRecord",
    "Verification",
]
