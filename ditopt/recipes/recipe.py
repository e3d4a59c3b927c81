"""`Recipe`: a published step cache as a YAML file.

A recipe holds the rule with its published settings, the paper, what this form of it leaves out, and
the values to try where a comparison gives each recipe its best settings for a budget.
"""

from __future__ import annotations

import itertools
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ditopt import files
from ditopt.errors import PlanError, did_you_mean
from ditopt.plan.yaml_text import load
from ditopt.recipes.rules import Rule

if TYPE_CHECKING:
    from ditopt.caching import CacheSchedule, Signals

_FOLDER = Path(__file__).parent
_MOST_SETTINGS = 5000
_RULE: TypeAdapter[Rule] = TypeAdapter(Rule)

Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]


class Paper(BaseModel):
    """Where the rule comes from.

    Attributes:
        title: of the paper.
        arxiv: its number.
        where: section, algorithm or released code that states the rule.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: Text
    arxiv: Annotated[str, StringConstraints(pattern=r"^\d{4}\.\d{4,5}$")]
    where: Text


class Recipe(BaseModel):
    """One published step cache.

    Attributes:
        ditopt_recipe: version of the format.
        name: for tables.
        paper: its source.
        rule: with published settings.
        differs: what a static schedule of the whole stack's residual leaves out of it.
        values: setting -> values to try.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ditopt_recipe: Literal[1]
    name: Text
    paper: Paper
    rule: Rule
    differs: Text | None = None
    values: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}

    def model_post_init(self, context: object) -> None:
        """Check the values against the rule's own fields, before anything is sampled."""
        known = sorted(type(self.rule).model_fields)
        for setting, values in self.values.items():
            if setting not in known or setting == "kind":
                raise PlanError(
                    f"values: {self.rule.kind} has no setting {setting!r}",
                    remedy=did_you_mean(setting, known),
                )
            for value in values:
                self._with({setting: value})
        count = 1
        for values in self.values.values():
            count *= len(values)
        if count > _MOST_SETTINGS:
            raise PlanError(f"values: {count} combinations, at most {_MOST_SETTINGS} are tried")

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Self:
        """A recipe that ships with ditopt, by name, or any YAML file by its path.

        Raises:
            PlanError: no such recipe, or it is malformed; says which field.
        """
        path = _FOLDER / f"{os.fspath(name)}.yaml"
        if not path.exists():
            path = Path(name)
            if path.suffix not in (".yaml", ".yml"):
                remedy = did_you_mean(os.fspath(name), recipe_names())
                raise PlanError(f"no recipe {os.fspath(name)!r}", remedy=remedy)
        try:
            return cls.model_validate(load(files.read_text(path)))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise PlanError(f"{path.name}: {field}: {first['msg']}") from error

    def schedule(self, signals: Signals) -> CacheSchedule:
        """What the published settings give on the recorded runs."""
        return self.rule.schedule(signals)

    def variants(self, signals: Signals) -> list[tuple[dict[str, Any], CacheSchedule]]:
        """The different schedules that all combinations of `values` give, with their settings."""
        found: dict[Any, tuple[dict[str, Any], CacheSchedule]] = {}
        for chosen in itertools.product(*self.values.values()):
            settings = dict(zip(self.values, chosen, strict=True))
            schedule = self._with(settings).schedule(signals)
            key = (schedule.full, tuple(sorted(schedule.rows.items())))
            found.setdefault(key, (settings, schedule))
        return list(found.values())

    def _with(self, settings: dict[str, Any]) -> Rule:
        rule: Rule = _RULE.validate_python({**self.rule.model_dump(), **settings})
        return rule


@cache
def recipe_names() -> tuple[str, ...]:
    """The recipes that ship with ditopt."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
