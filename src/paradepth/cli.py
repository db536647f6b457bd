"""The command line: `paradepth COMMAND …`, or `python -m paradepth COMMAND …` (under torchrun, too).

Every command takes --json: one JSON object on standard output, everything else on standard error.
Exit status: 0 done, 1 failed or interrupted, 2 refused because of bad input.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from paradepth import __version__
from paradepth.models import from_pretrained, list_models
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

_FLAT = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True)
class _Train:
    """Train by a recipe; any option of the recipe can be replaced."""

    run_dir: Path | None = None
    """Run directory; runs/RECIPE by default."""
    overwrite: bool = False
    """Replace the run that is in the run directory."""
    json: bool = False
    """Print the result as one JSON object."""
    model_options: _FLAT[ModelOptions] = field(default_factory=ModelOptions)
    data_options: _FLAT[DataOptions] = field(default_factory=DataOptions)
    schedule_options: _FLAT[ScheduleOptions] = field(default_factory=ScheduleOptions)
    depth_options: _FLAT[DepthOptions] = field(default_factory=DepthOptions)
    optimiser_options: _FLAT[OptimiserOptions] = field(default_factory=OptimiserOptions)
    run_options: _FLAT[RunOptions] = field(default_factory=RunOptions)


@dataclass(frozen=True)
class _Resume:
    """Continue an interrupted run from its newest checkpoint."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class _Evaluate:
    """Evaluate a finished run on its test or validation split."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    branches: int | None = None
    """Use the first K branches only."""
    split: Literal["test", "validation"] = "test"
    """Which split."""
    data_dir: Path | None = None
    """Where the data lies now, if it moved since training."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class _Predict:
    """Classify image files."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder with config.json and model.safetensors."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    branches: int | None = None
    """Use the first K branches only."""
    top: int = 1
    """How many classes to name for each image."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class _Report:
    """Write the HTML report of a run, or a comparison of several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """HTML file; RUN/report.html for one run, comparison.html for several."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class _List:
    """List recipes, models or studies."""

    what: tyro.conf.Positional[Literal["recipes", "models", "studies"]]
    """What to list."""
    pattern: tyro.conf.Positional[str] = "*"
    """Shell pattern that names must match."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class _Study:
    """Run a study: a grid of configurations and seeds. Finished cells are kept; a rerun does only what is missing."""

    name: tyro.conf.Positional[str]
    """Name of the study; see `paradepth list studies`."""
    out: Path | None = None
    """Folder for cells, results.json and report.html; studies/NAME by default."""
    data_dir: Path | None = None
    """Folder with local data sets; None fetches from the Hub."""
    workers: int = 1
    """Cells that run side by side, one thread each."""
    only: str | None = None
    """Shell pattern of the cells to run."""
    rerun: bool = False
    """Run finished cells again."""
    json: bool = False
    """Print the result as one JSON object."""


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").splitlines()[0]


def _train(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train import start_run

    if not options or options[0].startswith("-"):
        names = "\n".join(f"  {name:26} {_first_line(RECIPES[name])}" for name in sorted(RECIPES))
        print(
            f"usage: paradepth train RECIPE [--option value …]     (--help after a recipe lists its options)\n\n{names}"
        )
        if options and options[0] in ("-h", "--help"):
            raise SystemExit(0)
        raise ValueError("train needs a recipe, for example: paradepth train digits_paraformer")
    recipe = get_recipe(options[0])
    groups = recipe.groups()
    chosen = _parse(
        _Train, options[1:], f"train {options[0]}", default=_Train(**groups), about=inspect.getdoc(RECIPES[options[0]])
    )
    wanted = Config(recipe=recipe.recipe, **{name: getattr(chosen, name) for name in groups})
    config = recipe.replace(**recipe.changed(wanted))
    folder = chosen.run_dir or Path("runs") / recipe.recipe
    result = start_run(config, folder, overwrite=chosen.overwrite)
    return _with_report(result)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # torchrun numbers its processes


def _with_report(result: dict[str, Any]) -> dict[str, Any]:
    from paradepth.report import write_report

    if _is_main_process():
        result["report"] = str(write_report([Path(result["run"])]))
    return result


def _resume(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train import resume_run

    return _with_report(resume_run(_parse(_Resume, options, "resume").run))


def _evaluate(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train.use import evaluate_run

    o = _parse(_Evaluate, options, "evaluate")
    return evaluate_run(o.run, split=o.split, branches=o.branches, data_dir=o.data_dir, device=o.device)


def _predict(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train.use import predict_images

    o = _parse(_Predict, options, "predict")
    model = from_pretrained(o.run)
    return {"predictions": predict_images(model, o.images, branches=o.branches, top=o.top)}


def _report(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.report import write_report

    o = _parse(_Report, options, "report")
    if not o.runs:
        raise ValueError("report needs at least one run directory")
    out = o.out or (Path("comparison.html") if len(o.runs) > 1 else None)
    return {"report": str(write_report(list(o.runs), out))}


def _list(options: Sequence[str]) -> dict[str, Any]:
    from fnmatch import fnmatchcase

    from paradepth.studies import STUDIES

    o = _parse(_List, options, "list")
    if o.what == "models":
        return {"models": list_models(o.pattern)}
    known = (
        {name: _first_line(function) for name, function in RECIPES.items()}
        if o.what == "recipes"
        else {name: study().title for name, study in STUDIES.items()}
    )
    return {o.what: {name: about for name, about in sorted(known.items()) if fnmatchcase(name, o.pattern)}}


def _study(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.studies import get_study
    from paradepth.studies.runner import run_study

    o = _parse(_Study, options, "study")
    study = get_study(o.name)
    out = o.out or Path("studies") / o.name
    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print
    summary = run_study(study, out=out, data_dir=o.data_dir, workers=o.workers, only=o.only, rerun=o.rerun, say=say)
    if summary["failed"]:
        raise RuntimeError(f"{len(summary['failed'])} cells failed: {summary['failed']}")
    return {key: str(value) if isinstance(value, Path) else value for key, value in summary.items()}


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], dict[str, Any]], str]] = {
    "train": (_train, "train a model by a recipe"),
    "resume": (_resume, "continue an interrupted run"),
    "evaluate": (_evaluate, "measure a run, with any number of its branches"),
    "predict": (_predict, "classify image files"),
    "report": (_report, "write the HTML report of a run or a comparison of runs"),
    "list": (_list, "list recipes, models or studies"),
    "study": (_study, "run a study and build its report"),
}


def _parse(cls: type, options: Sequence[str], name: str, *, default: Any = None, about: str | None = None) -> Any:
    """Parses a command's options; what is wrong is printed by tyro, with exit status 2."""
    annotated: Any = Annotated[cls, tyro.conf.arg(name="")]
    extra = {} if default is None else {"default": default}
    return tyro.cli(
        cls if default is None else annotated,
        args=list(options),
        prog=f"paradepth {name}",
        description=about or inspect.getdoc(cls),
        console_outputs=True,
        **extra,
    )


def _show(result: dict[str, Any]) -> None:
    """Prints a result for people."""
    console = Console(soft_wrap=True, highlight=False)
    for key, value in result.items():
        if isinstance(value, dict) and value and not any(isinstance(v, list | dict) for v in value.values()):
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
            for name, about in value.items():
                table.add_row(str(name), str(about))
            console.print(table)
        elif key == "accuracy" and isinstance(value, list):
            console.print("accuracy by prefix: " + "  ".join(f"{100 * a:.2f} %" for a in value))
        elif key == "predictions":
            for item in value:
                best = ", ".join(f"{c['class']} {100 * c['confidence']:.1f} %" for c in item["classes"])
                console.print(f"{item['image']}: {best}", markup=False)
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            console.print("\n".join(value), markup=False)
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            console.print(f"{key}: {shown}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage = "usage: paradepth COMMAND …\n\n" + "\n".join(f"  {n:10} {about}" for n, (_, about) in _COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + "\n\n`paradepth COMMAND --help` explains a command.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *options = arguments
    if command not in _COMMANDS:
        print(f"unknown command {command!r}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        result = _COMMANDS[command][0](options)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except SystemExit as stop:
        if stop.code in (None, 0, 2):
            raise
        print(f"stopped: {stop.code}", file=sys.stderr)  # a signal while a study runs
        return 1
    if not _is_main_process():
        return 0
    if "--json" in options:
        print(json.dumps(result))
    else:
        _show(result)
    return 0
