"""Published step caches as data: one YAML file per paper, run and judged like any plan."""

from ditopt.recipes.recipe import Recipe, recipe_names
from ditopt.recipes.rules import Rule

__all__ = ["Recipe", "Rule", "recipe_names"]
