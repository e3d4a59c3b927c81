"""What a rule of quantization is: from profiles of a model and its layers to formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict

from ditopt.errors import PlanError
from ditopt.quantization.layer import misfit, operands

if TYPE_CHECKING:
    from ditopt.plan import Phase
    from ditopt.profiling.linears import LinearGroup, LinearProfile
    from ditopt.profiling.schema import Profile
    from ditopt.quantization import LinearRule

Role = Literal["self", "cross", "joint", "ff"]


@dataclass(frozen=True)
class Ground:
    """What a rule decides about.

    Attributes:
        profile: of the model.
        linears: of its layers.
    """

    profile: Profile
    linears: LinearProfile

    def groups(self, rule: LinearRule) -> list[LinearGroup]:
        """Layers of numbered blocks that can have the rule.

        Embedders and the last projection stay as they are, as in every one of the papers.
        """
        return [
            group
            for group in self.linears.groups
            if misfit(rule, group.in_features) is None
            and any(part.isdigit() for part in group.members[0].split("."))
        ]

    def role(self, group: LinearGroup) -> Role:
        """Kind of the attention whose module holds the layers; `ff` outside of attentions."""
        layer = group.members[0]
        paths = {site.id.rpartition("#")[0]: site.kind for site in self.profile.model.sites}
        holding = [path for path in paths if layer.startswith(f"{path}.")]
        return paths[max(holding, key=len)] if holding else "ff"

    def number(self, rule: LinearRule) -> int:
        """Place of a rule among those that the profile tried.

        Raises:
            PlanError: it did not.
        """
        if rule not in self.linears.rules:
            raise PlanError(
                f"the profile of linear layers did not try {rule!r}",
                remedy="Profile with `profile_linears(..., rules=recipe.candidates())`.",
            )
        return self.linears.rules.index(rule)


class Rule(BaseModel):
    """A published rule with its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def candidates(self) -> tuple[LinearRule, ...]:
        """Formats that the plan may name."""
        raise NotImplementedError

    def phases(self, ground: Ground) -> tuple[Phase, ...]:
        """Formats for all calls; layers that none fits are left alone."""
        raise NotImplementedError


def bits(rule: LinearRule, group: LinearGroup) -> float:
    """Bits that a group's layers, merged, hold under a rule: scales and transforms included."""
    n, k = sum(group.out_features), group.in_features
    parts = operands(rule, n, k, torch.bfloat16).values()
    return 8.0 * sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
