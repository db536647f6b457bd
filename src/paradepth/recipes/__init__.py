"""Recipes: functions that return the options of a run; each docstring states the expected time and accuracy."""

from paradepth.recipes.images import (
    cifar10_paraformer,
    cifar10_vit,
    cifar100_paraformer,
    digits_paraformer,
    fashion_paraformer,
    fashion_vit,
    paraformer_authors_224,
)
from paradepth.recipes.language import (
    shakespeare_branch_sums,
    shakespeare_gpt,
    shakespeare_mgrit,
    shakespeare_mgrit_control,
)
from paradepth.recipes.registry import RECIPES, get_recipe

for _recipe in (
    digits_paraformer,
    fashion_paraformer,
    fashion_vit,
    cifar10_paraformer,
    cifar10_vit,
    cifar100_paraformer,
    paraformer_authors_224,
    shakespeare_gpt,
    shakespeare_mgrit,
    shakespeare_mgrit_control,
    shakespeare_branch_sums,
):
    RECIPES[_recipe.__name__] = _recipe

__all__ = ["RECIPES", "get_recipe"]
