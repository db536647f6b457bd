"""Commands about runs: evaluate, report, list, study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from paradepth.cli.parse import Commands, first_line, parse
from paradepth.models import list_models
from paradepth.recipes import RECIPES


@dataclass(frozen=True)
class _Evaluate:
    """Evaluate a finished run on its test or validation split."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    branches: int | None = None
    """Use the first K branches only."""
    split: Literal["test", "validation", "mismatched"] = "test"
    """Which split; mismatched is the second test split of MNLI."""
    data_dir: Path | None = None
    """Where the data lies now, if it moved since training."""
    device: str = "auto"
    """auto, cpu or cuda."""
    branch_processes: int = 1
    """Processes that share the branches, under torchrun; the others share the batches."""
    branch_executor: Literal["loop", "batched", "threads", "auto"] | str = "loop"
    """How branches are evaluated."""
    skip_below: float = 0.0
    """Gated models: do not run a branch for samples whose gate is below this, and tell what that saves."""
    early_stop: float | None = None
    """Stop each sample of a classifier as soon as it is confident, and accept that loss of accuracy (0.01 is one
    percentage point): thresholds are found on the validation split. Writes early_stop.json into the run directory."""
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
    size: Literal["smoke", "here", "paper"] = "here"
    """smoke takes seconds and shows that the study runs; here is what is published, for two cores and hours; paper has
    the papers' sizes and data, for GPUs."""
    out: Path | None = None
    """Folder for cells, results.json and report.html; studies/NAME by default, studies/NAME-SIZE for other sizes."""
    data_dir: Path | None = None
    """Folder with local data sets; None fetches from the Hub."""
    workers: int = 1
    """Cells that run side by side, one thread each."""
    only: str | None = None
    """Shell pattern of the cells to run."""
    rerun: bool = False
    """Run finished cells again."""
    report_only: bool = False
    """Run nothing; write results.json and report.html from the cells that are there."""
    json: bool = False
    """Print the result as one JSON object."""


def _evaluate(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train.use import evaluate_run

    o = parse(_Evaluate, options, "evaluate")
    if o.early_stop is not None:
        return _early_stop(o)
    return evaluate_run(
        o.run,
        split=o.split,
        branches=o.branches,
        data_dir=o.data_dir,
        device=o.device,
        branch_processes=o.branch_processes,
        branch_executor=o.branch_executor,
        skip_below=o.skip_below,
    )


def _early_stop(o: _Evaluate) -> dict[str, Any]:
    from paradepth.train.early_stop import early_stop_run

    if o.branch_processes != 1:
        raise ValueError(f"branch_processes is {o.branch_processes}; early stop evaluates branches one after another")
    if o.skip_below:
        raise ValueError(f"skip_below is {o.skip_below}; early stop has its own rule for what is left out")
    return early_stop_run(
        o.run,
        tolerance=o.early_stop or 0.0,
        split=o.split,
        branches=o.branches,
        data_dir=o.data_dir,
        device=o.device,
        branch_executor=o.branch_executor,
    )


def _report(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.report import write_report

    o = parse(_Report, options, "report")
    if not o.runs:
        raise ValueError("report needs at least one run directory")
    out = o.out or (Path("comparison.html") if len(o.runs) > 1 else None)
    return {"report": str(write_report(list(o.runs), out))}


def _list(options: Sequence[str]) -> dict[str, Any]:
    from fnmatch import fnmatchcase

    from paradepth.studies import STUDIES, get_study

    o = parse(_List, options, "list")
    if o.what == "models":
        return {"models": list_models(o.pattern)}
    known = (
        {name: first_line(function) for name, function in RECIPES.items()}
        if o.what == "recipes"
        else {name: get_study(name).title for name in STUDIES}
    )
    return {o.what: {name: about for name, about in sorted(known.items()) if fnmatchcase(name, o.pattern)}}


def _study(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.studies import get_study
    from paradepth.studies.runner import run_study, write_results

    o = parse(_Study, options, "study")
    study = get_study(o.name, o.size)
    out = o.out or Path("studies") / (o.name if o.size == "here" else f"{o.name}-{o.size}")
    if o.report_only:
        write_results(study, out)
        return {"out": str(out)}
    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print
    summary = run_study(study, out=out, data_dir=o.data_dir, workers=o.workers, only=o.only, rerun=o.rerun, say=say)
    if summary["failed"]:
        raise RuntimeError(f"{len(summary['failed'])} cells failed: {summary['failed']}")
    return {key: str(value) if isinstance(value, Path) else value for key, value in summary.items()}


COMMANDS: Commands = {
    "evaluate": (_evaluate, "measure a run, with any number of its branches"),
    "report": (_report, "write the HTML report of a run or a comparison of runs"),
    "list": (_list, "list recipes, models or studies"),
    "study": (_study, "run a study and build its report"),
}
