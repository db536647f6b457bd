"""Recipes by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from paradepth.train import Config

RECIPES: dict[str, Callable[[], Config]] = {}


def get_recipe(name: str) -> Config:
    """The options of the recipe called `name`.

    Raises:
        ValueError: unknown recipe.

    >>> get_recipe("digits_paraformer").recipe
    'digits_paraformer'
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(sorted(RECIPES))}")
    return dataclasses.replace(RECIPES[name](), recipe=name)
