"""Published methods as data: one YAML file per paper, run and judged like any plan."""

from ditopt.recipes.attention import AttentionRecipe, attention_recipe_names, plan_of_recipe
from ditopt.recipes.quantization import (
    QuantizationRecipe,
    plan_of_recipe_for_linears,
    quantization_recipe_names,
)
from ditopt.recipes.recipe import Recipe, recipe_names
from ditopt.recipes.rules import Rule

__all__ = [
    "AttentionRecipe",
    "QuantizationRecipe",
    "Recipe",
    "Rule",
    "attention_recipe_names",
    "plan_of_recipe",
    "plan_of_recipe_for_linears",
    "quantization_recipe_names",
    "recipe_names",
]
