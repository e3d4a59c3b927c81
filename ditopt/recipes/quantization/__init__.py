"""Published quantization as data: one YAML file per paper, planned and judged like any plan."""

from ditopt.recipes.quantization.recipe import (
    QuantizationRecipe,
    plan_of_recipe_for_linears,
    quantization_recipe_names,
)
from ditopt.recipes.quantization.rules import QuantizationRule

__all__ = [
    "QuantizationRecipe",
    "QuantizationRule",
    "plan_of_recipe_for_linears",
    "quantization_recipe_names",
]
