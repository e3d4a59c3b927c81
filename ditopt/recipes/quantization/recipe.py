"""`QuantizationRecipe`: published quantization as a YAML file, and its plan for a profile."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ditopt.errors import PlanError, ProfileError
from ditopt.plan import Plan
from ditopt.quantization.codebook import CALIBRATED
from ditopt.quantization.transforms import NEEDS
from ditopt.recipes.file import RecipeFile
from ditopt.recipes.quantization.base import Ground
from ditopt.recipes.quantization.rules import QuantizationRule

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.plan import Phase
    from ditopt.profiling.linears import LinearProfile
    from ditopt.profiling.schema import Profile
    from ditopt.quantization import LinearRule


class QuantizationRecipe(RecipeFile[QuantizationRule]):
    """One published quantization of linear layers; fields as in `RecipeFile`."""

    folder: ClassVar[Path] = Path(__file__).parent

    def candidates(self, setting: Mapping[str, Any] | None = None) -> tuple[LinearRule, ...]:
        """Formats that the plan may name: what `profile_linears(rules=...)` is to try."""
        return tuple(self.rule_with(dict(setting or {})).candidates())

    def plan(
        self,
        profile: Profile,
        linears: LinearProfile,
        setting: Mapping[str, Any] | None = None,
        *,
        tensors: Mapping[str, Tensor],
    ) -> Plan:
        """What the rule decides about a profiled model: no caching, dense attention.

        Args:
            profile: of the model.
            linears: of its layers; where the rule reads errors, with those of `candidates`.
            setting: of the rule, in place of published values; one of `settings`.
            tensors: for the side file: `profiling.linears.load_statistics(folder)`, or what
                `quantization.block_calibration.calibrate` gives.

        Raises:
            PlanError: an unknown setting, or profile or tensors lack what the rule reads.
        """
        rule = self.rule_with(dict(setting or {}))
        phases = rule.phases(Ground(profile, linears))
        kept = _needed(phases, tensors)
        named = set().union(*(phase.linear for phase in phases))
        alone = [record.id for record in linears.records if record.id not in named]
        notes = [f"recipe {self.name}, arXiv {self.paper.arxiv}, not verified by sampling"]
        if alone:
            why = "outside of the blocks, or of a width that the format does not take"
            notes.append(f"left alone, {why}: {', '.join(alone)}"[:2000])
        plan = Plan(
            model=profile.model.model_copy(update={"linears": linears.records}),
            sampler=profile.sampler,
            hardware=profile.hardware,
            layout=profile.layout,
            block=profile.block,
            phases=phases,
            assumptions=(*notes, *([self.differs] if self.differs else [])),
        )
        return plan.with_tensors(kept) if kept else plan


def _needed(phases: tuple[Phase, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The side file's tensors that the rules read."""
    found = {}
    for layer, rule in ((layer, rule) for phase in phases for layer, rule in phase.linear.items()):
        for name in (*NEEDS[rule.transform], *(CALIBRATED if rule.calibrated else ())):
            key = f"linear/{name}/{layer}"
            if key not in tensors:
                raise PlanError(
                    f"no tensor {key!r}",
                    remedy="Pass those of `load_statistics`, for a codebook of `calibrate`.",
                )
            found[key] = tensors[key]
    return found


def quantization_recipe_names() -> tuple[str, ...]:
    """The quantizations that ship with ditopt."""
    return QuantizationRecipe.names()


def plan_of_recipe_for_linears(
    folder: str | os.PathLike[str], name: str, setting: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of a recipe for the profile of layers in a folder.

    Raises:
        ProfileError: no finished profile, or none of the layers.
        PlanError: no such recipe, an unknown setting, or the profile lacks what the rule reads.
    """
    from ditopt.profiling.linears import LinearProfile, load_statistics
    from ditopt.profiling.schema import load_complete

    profile, _ = load_complete(folder)
    linears = LinearProfile.load(folder)
    if linears is None:
        raise ProfileError(
            f"{os.fspath(folder)!r} holds no profile of the linear layers",
            remedy="Run `ditopt profile --linears` into it.",
        )
    recipe = QuantizationRecipe.load(name)
    return recipe.plan(profile, linears, setting, tensors=load_statistics(folder))
