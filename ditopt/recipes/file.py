"""What all recipe files hold: a rule, its paper, what is left out, and the values to try."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ditopt import files
from ditopt.errors import PlanError, did_you_mean
from ditopt.plan.yaml_text import load

_MOST_SETTINGS = 5000

Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
RuleT = TypeVar("RuleT", bound=BaseModel)


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


class RecipeFile(BaseModel, Generic[RuleT]):
    """One published method.

    Attributes:
        ditopt_recipe: version of the format.
        name: for tables.
        paper: its source.
        rule: with published settings.
        differs: what this form leaves out of it, or does otherwise.
        values: setting -> values to try, where a comparison gives each method its best settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: ClassVar[Path]

    ditopt_recipe: Literal[1]
    name: Text
    paper: Paper
    rule: RuleT
    differs: Text | None = None
    values: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}

    def model_post_init(self, context: object) -> None:
        """Check the values against the rule's own fields, before anything is sampled."""
        known = sorted(type(self.rule).model_fields)
        for setting, values in self.values.items():
            if setting not in known or setting == "kind":
                kind = self.rule.model_dump()["kind"]
                remedy = did_you_mean(setting, known)
                raise PlanError(f"values: {kind} has no setting {setting!r}", remedy=remedy)
            for value in values:
                self.rule_with({setting: value})
        count = 1
        for values in self.values.values():
            count *= len(values)
        if count > _MOST_SETTINGS:
            raise PlanError(f"values: {count} combinations, at most {_MOST_SETTINGS} are tried")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The recipes of this kind that ship with ditopt."""
        return tuple(sorted(path.stem for path in cls.folder.glob("*.yaml")))

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Self:
        """A recipe that ships with ditopt, by name, or any YAML file by its path.

        Raises:
            PlanError: no such recipe, or it is malformed; says which field.
        """
        path = cls.folder / f"{os.fspath(name)}.yaml"
        if not path.exists():
            path = Path(name)
            if path.suffix not in (".yaml", ".yml"):
                remedy = did_you_mean(os.fspath(name), cls.names())
                raise PlanError(f"no recipe {os.fspath(name)!r}", remedy=remedy)
        try:
            return cls.model_validate(load(files.read_text(path)))
        except ValidationError as error:
            raise PlanError(f"{path.name}: {_first(error)}") from error

    def settings(self) -> list[dict[str, Any]]:
        """All combinations of `values`; one without any where there are none."""
        return [
            dict(zip(self.values, chosen, strict=True))
            for chosen in itertools.product(*self.values.values())
        ]

    def rule_with(self, settings: dict[str, Any]) -> RuleT:
        """The rule with other settings.

        Raises:
            PlanError: an unknown setting, or a value that it cannot have.
        """
        try:
            return type(self.rule).model_validate({**self.rule.model_dump(), **settings})
        except ValidationError as error:
            raise PlanError(f"{self.name}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
