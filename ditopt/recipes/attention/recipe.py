"""`AttentionRecipe`: a published sparse attention as a YAML file, and its plan for a profile."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ditopt.plan import Phase, Plan
from ditopt.profiling.schema import load_complete
from ditopt.recipes.attention.rules import AttentionRule
from ditopt.recipes.file import RecipeFile

if TYPE_CHECKING:
    from ditopt.profiling.schema import Profile, SeedRecord


class AttentionRecipe(RecipeFile[AttentionRule]):
    """One published sparse attention; fields as in `RecipeFile`."""

    folder: ClassVar[Path] = Path(__file__).parent

    def plan(
        self,
        profile: Profile,
        records: Sequence[SeedRecord],
        setting: Mapping[str, Any] | None = None,
    ) -> Plan:
        """What the rule decides about a profiled model: no caching, no other number formats.

        Args:
            profile: of the model.
            records: one per seed; rules that know errors of heads read them.
            setting: of the rule, in place of published values; one of `settings`.

        Raises:
            PlanError: an unknown setting, or a model that the method is not about.
        """
        rule = self.rule_with(dict(setting or {}))
        ground = rule.ground(profile, records)
        first, end = ground.calls
        calls = profile.sampler.calls
        sparse = rule.phases(ground) if first < end else ()
        dense = [Phase(calls=span) for span in ((0, first), (end, calls)) if span[0] < span[1]]
        phases = tuple(sorted((*dense, *sparse), key=lambda phase: phase.calls))
        notes = [f"recipe {self.name}, arXiv {self.paper.arxiv}, not verified by sampling"]
        return Plan(
            model=profile.model,
            sampler=profile.sampler,
            hardware=profile.hardware,
            layout=profile.layout,
            block=rule.block(profile),
            order=rule.order(profile),
            phases=phases,
            assumptions=(*notes, *([self.differs] if self.differs else [])),
        )


def attention_recipe_names() -> tuple[str, ...]:
    """The sparse attentions that ship with ditopt."""
    return AttentionRecipe.names()


def plan_of_recipe(
    folder: str | os.PathLike[str], name: str, setting: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a recipe for the profile in a folder.

    Raises:
        ProfileError: no finished profile.
        PlanError: no such recipe, an unknown setting, or a model that it is not about.
    """
    profile, records = load_complete(folder)
    return AttentionRecipe.load(name).plan(profile, records, setting)
