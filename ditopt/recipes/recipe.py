"""`Recipe`: a published step cache as a YAML file.

A recipe holds the rule with its published settings, the paper, what a static schedule of the whole
stack's residual leaves out of it, and the values to try where a comparison gives each recipe its
best settings for a budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ditopt.recipes.file import Paper as Paper
from ditopt.recipes.file import RecipeFile
from ditopt.recipes.rules import Rule

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule, Signals


class Recipe(RecipeFile[Rule]):
    """One published step cache; fields as in `RecipeFile`."""

    folder: ClassVar[Path] = Path(__file__).parent

    def schedule(self, signals: Signals) -> CacheSchedule:
        """What the published settings give on the recorded runs."""
        return self.rule.schedule(signals)

    def variants(self, signals: Signals) -> list[tuple[dict[str, Any], CacheSchedule]]:
        """The different schedules that all combinations of `values` give, with their settings."""
        found: dict[Any, tuple[dict[str, Any], CacheSchedule]] = {}
        for settings in self.settings():
            schedule = self.rule_with(settings).schedule(signals)
            key = (schedule.full, tuple(sorted(schedule.rows.items())))
            found.setdefault(key, (settings, schedule))
        return list(found.values())


def recipe_names() -> tuple[str, ...]:
    """The step caches that ship with ditopt."""
    return Recipe.names()
