"""Published sparse attention as data: one YAML file per paper, planned and judged like any plan."""

from ditopt.recipes.attention.recipe import AttentionRecipe, attention_recipe_names, plan_of_recipe
from ditopt.recipes.attention.rules import AttentionRule

__all__ = ["AttentionRecipe", "AttentionRule", "attention_recipe_names", "plan_of_recipe"]
