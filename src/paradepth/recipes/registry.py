"""Recipes by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from paradepth.train import Config

RECIPES: dict[str, Callable[[], Config]] = {}
"""Recipes by name."""


def register_recipe(recipe: Callable[[], Config]) -> Callable[[], Config]:
    """Decorator: makes a recipe known by the name of its function. Its docstring is its help, the first line its entry
    in lists.

    Raises:
        ValueError: the name is taken, or there is no docstring.

    >>> register_recipe(RECIPES["digits_paraformer"])
    Traceback (most recent call last):
    ...
    ValueError: there is a recipe 'digits_paraformer' already; take another name
    """
    name = recipe.__name__
    if name in RECIPES:
        raise ValueError(f"there is a recipe {name!r} already; take another name")
    if not recipe.__doc__:
        raise ValueError(f"recipe {name!r} has no docstring; say what it trains, how long it takes and what to expect")
    RECIPES[name] = recipe
    return recipe


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
