"""Published methods as data: one YAML file per paper, run and judged like any plan."""

from ditopt.recipes.attention import AttentionRecipe, attention_recipe_names, plan_of_recipe
from ditopt.recipes.recipe import Recipe, recipe_names
from ditopt.recipes.rules import Rule

__all__ = [
    "AttentionRecipe",
    "Recipe",
    "Rule",
    "attention_recipe_names",
    "plan_of_recipe",
    "recipe_names",
]
