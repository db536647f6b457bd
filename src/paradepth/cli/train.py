"""Commands that train: train, finetune, resume."""

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
    BranchOptions,
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
    report: bool = True
    """Write report.html into the run directory; `paradepth report` writes it later."""
    json: bool = False
    """Print the result as one JSON object."""
    model_options: FLAT[ModelOptions] = field(default_factory=ModelOptions)
    data_options: FLAT[DataOptions] = field(default_factory=DataOptions)
    schedule_options: FLAT[ScheduleOptions] = field(default_factory=ScheduleOptions)
    depth_options: FLAT[DepthOptions] = field(default_factory=DepthOptions)
    branch_options: FLAT[BranchOptions] = field(default_factory=BranchOptions)
    optimiser_options: FLAT[OptimiserOptions] = field(default_factory=OptimiserOptions)
    run_options: FLAT[RunOptions] = field(default_factory=RunOptions)


@dataclass(frozen=True)
class _Finetune(_Train):
    """Fine-tune a trained model on other data: its tokeniser, stem and trunk with a new head. Any training option can
    be given; shape, step and buffers are the source's."""

    task: str = ""
    """Data to fine-tune on, by name: sst2, cola, mrpc, rte, qnli, mnli, qqp or labelled for texts; cifar100 and the
    like for images."""


@dataclass(frozen=True)
class _Resume:
    """Continue an interrupted run from its newest checkpoint."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    branch_processes: int | None = None
    """Processes that share the branches from now on; None: as before, or all where their number does not fit."""
    report: bool = True
    """Write report.html into the run directory; `paradepth report` writes it later."""
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
    return with_report(result, wanted=chosen.report)


def _finetune(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train import start_run
    from paradepth.train.finetune import finetune_config

    usage = (
        "usage: paradepth finetune RUN --task NAME [--data-dir PLACE] [--option value …]\n"
        "RUN is a run directory, a saved model, or hf:FOLDER or hf:NAME for an encoder of the transformers library."
    )
    if not options or options[0].startswith("-"):
        print(usage)
        if options and options[0] in ("-h", "--help"):
            raise SystemExit(0)
        raise ValueError("finetune needs a trained model, for example: paradepth finetune runs/bert_mini --task sst2")
    source = options[0]
    task = _given(options[1:], "--task")
    if task is None:
        print(usage)
        raise ValueError("finetune needs a task, for example --task sst2")
    start = finetune_config(source, task)
    groups = start.groups()
    chosen = parse(_Finetune, options[1:], f"finetune {source}", default=_Finetune(**groups, task=task))
    wanted = Config(recipe=start.recipe, **{name: getattr(chosen, name) for name in groups})
    config = start.replace(**start.changed(wanted))
    if config.data_options.data != task or config.run_options.init != start.run_options.init:
        raise ValueError("data and init follow from RUN and --task; leave them out")
    folder = chosen.run_dir or Path("runs") / start.recipe
    result = start_run(config, folder, overwrite=chosen.overwrite)
    return with_report(result, wanted=chosen.report)


def _given(options: Sequence[str], name: str) -> str | None:
    """The value of an option on the command line."""
    for place, option in enumerate(options):
        if option == name and place + 1 < len(options):
            return options[place + 1]
        if option.startswith(f"{name}="):
            return option.partition("=")[2]
    return None


def _resume(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.continual import resume_continual
    from paradepth.continual.run import is_continual
    from paradepth.train import resume_run

    o = parse(_Resume, options, "resume")
    if is_continual(o.run):
        if o.branch_processes is not None:
            raise ValueError(f"branch_processes is {o.branch_processes}; a continual run takes one process")
        return resume_continual(o.run)
    result = resume_run(o.run, branch_processes=o.branch_processes)
    return with_report(result, wanted=o.report)


COMMANDS: Commands = {
    "train": (_train, "train a model by a recipe"),
    "finetune": (_finetune, "fine-tune a trained model on other data"),
    "resume": (_resume, "continue an interrupted run"),
}
