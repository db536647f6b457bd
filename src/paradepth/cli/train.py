"""Commands that train: train, resume."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import FLAT, Commands, first_line, parse, with_report
from paradepth.recipes import RECIPES, get_recipe
from paradepth.train.config import (
    Config,
    DataOptions,
    DepthOptions,
    ModelOptions,
    OptimiserOptions,
    RunOptions,
    ScheduleOptions,
)


@dataclass(frozen=True)
class _Train:
    """Train by a recipe; any option of the recipe can be replaced."""

    run_dir: Path | None = None
    """Run directory; runs/RECIPE by default."""
    overwrite: bool = False
    """Replace the run that is in the run directory."""
    json: bool = False
    """Print the result as one JSON object."""
    model_options: FLAT[ModelOptions] = field(default_factory=ModelOptions)
    data_options: FLAT[DataOptions] = field(default_factory=DataOptions)
    schedule_options: FLAT[ScheduleOptions] = field(default_factory=ScheduleOptions)
    depth_options: FLAT[DepthOptions] = field(default_factory=DepthOptions)
    optimiser_options: FLAT[OptimiserOptions] = field(default_factory=OptimiserOptions)
    run_options: FLAT[RunOptions] = field(default_factory=RunOptions)


@dataclass(frozen=True)
class _Resume:
    """Continue an interrupted run from its newest checkpoint."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    json: bool = False
    """Print the result as one JSON object."""


def _train(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train import start_run

    if not options or options[0].startswith("-"):
        names = "\n".join(f"  {name:26} {first_line(RECIPES[name])}" for name in sorted(RECIPES))
        print(
            f"usage: paradepth train RECIPE [--option value …]     (--help after a recipe lists its options)\n\n{names}"
        )
        if options and options[0] in ("-h", "--help"):
            raise SystemExit(0)
        raise ValueError("train needs a recipe, for example: paradepth train digits_paraformer")
    recipe = get_recipe(options[0])
    groups = recipe.groups()
    chosen = parse(
        _Train, options[1:], f"train {options[0]}", default=_Train(**groups), about=inspect.getdoc(RECIPES[options[0]])
    )
    wanted = Config(recipe=recipe.recipe, **{name: getattr(chosen, name) for name in groups})
    config = recipe.replace(**recipe.changed(wanted))
    folder = chosen.run_dir or Path("runs") / recipe.recipe
    result = start_run(config, folder, overwrite=chosen.overwrite)
    return with_report(result)


def _resume(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train import resume_run

    return with_report(resume_run(parse(_Resume, options, "resume").run))


COMMANDS: Commands = {
    "train": (_train, "train a model by a recipe"),
    "resume": (_resume, "continue an interrupted run"),
}
