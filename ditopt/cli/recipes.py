"""`recipe`: the plan that a published method would make of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditopt.cli.common import JsonPath, ProfileDir, can_be_written, show
from ditopt.errors import PlanError, did_you_mean


def recipe(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As in docs/recipes.md.", show_default=False)
    ],
    profile_dir: ProfileDir,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Plan file to write.", callback=can_be_written
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="In place of a published setting."),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Plan by a published method's rule, not by search; `bench` measures what that gives."""
    from ditopt.recipes import attention_recipe_names as attention
    from ditopt.recipes import plan_of_recipe, plan_of_recipe_for_linears
    from ditopt.recipes import quantization_recipe_names as quantization

    setting = dict(_setting(text) for text in settings or ())
    if name in attention():
        plan = plan_of_recipe(profile_dir, name, setting)
    elif name in quantization():
        plan = plan_of_recipe_for_linears(profile_dir, name, setting)
    else:
        known = (*attention(), *quantization())
        remedy = f"{did_you_mean(name, known)} Known: {', '.join(known)}.".strip()
        raise PlanError(f"no recipe {name!r}", remedy=remedy)
    plan.save(out)
    show(
        f"Plan written to {out}; not verified by sampling.", plan.model_dump(mode="json"), json_path
    )


def _setting(text: str) -> tuple[str, Any]:
    """`density=0.25` as a name and a value.

    Raises:
        PlanError: there is no `=`, or the value is not YAML.
    """
    from ditopt.plan.yaml_text import load

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise PlanError(f"--set: expected KEY=VALUE, got {text!r}")
    return key, load(value)
