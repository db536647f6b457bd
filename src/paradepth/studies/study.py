"""What a study is: a question, and a grid of cells (configuration × seed) that answers it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from paradepth.studies.claim import Claim, Verdict
from paradepth.train.config import Config

Size = Literal["smoke", "here", "paper"]
"""How large a study is: seconds, for a test of its code; hours of two cores; or what the papers did."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# Options that are true, false or neither: no flags, but words.
_CHOICES = {f.name for group in Config().groups().values() for f in fields(group) if f.type == "bool | None"}
_RESERVED = ("seed", "threads", "data_dir", "run_dir", "overwrite", "json")
_MEASURE_RESERVED = (*_RESERVED, "source")


@dataclass(frozen=True)
class Cell:
    """One training run, or one measurement, of a study.

    Args:
        name: unique in its study and safe as a file name: letters, digits, `.`, `_`, `+`, `-`.
        group: the table the cell belongs to; only cells of one group are compared.
        label: the row of that table; cells of one row differ in their seed only.
        recipe: name of the recipe to train; of a cell that starts from another, the data to fine-tune on; of a
            continual run, its scenario; of a measurement, its name in `paradepth.studies.measurements`.
        options: the recipe's options, in Python spelling; JSON values other than dicts. The runner itself sets seed,
            threads, data_dir, run_dir, overwrite, json and, for a measurement, source.
        seed: the seed.
        after: the cell whose finished run this one fine-tunes, or measures.
        command: what makes the run: "train", "continual" for tasks that are learned one after another, or "measure"
            for a function of `paradepth.studies.measurements`.
        folder: of the data folder, the part that the cell reads, where it is not the whole.

    Raises:
        ValueError: an unsafe name, an option the runner sets, an option value that is not as above, or a continual run
            that starts from another.

    >>> cell = Cell(name="pf-0", group="small", label="PF", recipe="fashion_paraformer", options={"depth": 2}, seed=0)
    >>> cell.options_hash
    'a9dc7e660ac3'
    """

    name: str
    group: str
    label: str
    recipe: str
    options: Mapping[str, Any]
    seed: int
    after: Cell | None = None
    command: Literal["train", "continual", "measure"] = "train"
    folder: str = ""

    def __post_init__(self) -> None:
        if not _SAFE_NAME.fullmatch(self.name) or self.name.endswith((".log", ".json")):
            raise ValueError(
                f"cell name {self.name!r} is not allowed: letters, digits, '.', '_', '+' and '-', the first a letter "
                "or digit, and no .log or .json at the end"
            )
        if self.after is not None:
            if self.command == "continual":
                raise ValueError(f"cell {self.name}: a continual run does not start from another one")
            for option in {"init", "task"} & set(self.options) if self.command == "train" else ():
                raise ValueError(
                    f"cell {self.name}: it starts from {self.after.name}, and its recipe is the task; "
                    f"{option!r} is not an option of its own"
                )
        for option, value in self.options.items():
            reserved = _MEASURE_RESERVED if self.command == "measure" else _RESERVED
            if option.replace("-", "_") in reserved:
                raise ValueError(f"cell {self.name}: the runner sets {option!r} itself; it sets {', '.join(reserved)}")
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if not (item is None or isinstance(item, (bool, int, float, str))):
                    raise ValueError(
                        f"cell {self.name}: option {option!r} is {value!r}, but must be a string, a number, a boolean, "
                        "None or a flat list of these"
                    )

    @property
    def embedded(self) -> bool:
        """Whether it trains on, or measures a run on, the digits that come with scikit-learn and lie in no folder."""
        if self.command == "measure":
            return self.after is not None and self.after.embedded
        return self.command == "train" and self.options.get("data", self.recipe.split("_")[0]) == "digits"

    @property
    def options_hash(self) -> str:
        """Short hash of what determines the result: recipe, options, seed, and the same of the cell it starts from.
        Group and label may change freely."""
        definition: dict[str, Any] = {"recipe": self.recipe, "options": dict(self.options), "seed": self.seed}
        if self.after is not None:
            definition["after"] = self.after.options_hash
        if self.command != "train":
            definition["command"] = self.command
        return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Curve:
    """A plot with a line for each row of a group: a measure that is a list in each cell, mean over the seeds.

    Args:
        measure: name of the measure; a list, or of training runs a measure by prefix.
        x: the x values, of which a shorter list takes the first; or the name of a measure that has them.
        x_title: what they are, for the axis.
        title: what is drawn; by default the measure's name.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.
    """

    measure: str
    x: tuple[float, ...] | str
    x_title: str
    title: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Sweep:
    """A plot over the rows of a group: a measure that is a number in each cell, or of training runs the measure of
    the full model, against an option of the cells, mean over the seeds.

    Args:
        measure: name of the measure.
        x: name of the option that is the x value; rows without it, or whose value is no number, are left out.
        x_title: what it is, for the axis.
        lines: names of the options that rows of one line share; none: all rows are one line.
        title: what is drawn; by default the measure's name.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.
    """

    measure: str
    x: str
    x_title: str
    lines: tuple[str, ...] = ()
    title: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Study:
    """A grid of cells and what to say about them.

    Args:
        name: what `paradepth study NAME` calls it.
        title: headline of the report.
        question: what it is to find out, in a sentence or two.
        cells: the grid, in the order of the report's tables.
        findings: from the records of all cells (dicts as `paradepth.studies.record.read_run` makes them) to
            paragraphs for the report; called only when every cell is there.
        notes: a remark for each group that needs one.
        headline: the measure that a group's rows are compared by, under its name in `evaluation.json`: accuracy where
            nothing else is said, or loss, bleu, matthews ….
        may_diverge: whether a cell whose loss or gradient was not finite is a result, whose record has `diverged`
            instead of an accuracy, and not a failure of the study.
        claims: what the papers say about the question, and what they leave open of it.
        protocol: how the claims are tested, in a few sentences: data, shapes, budget, what is matched and what is not.
        verdicts: from the records of all cells to a verdict for each claim, by its name, by a stated rule; called only
            when every cell is there.
        curves: for each group that has some, what is drawn of its measures.
        size: how large it is; `get_study` sets it.

    Raises:
        ValueError: no cells, a name used twice, a note, headline or curves for an unknown group, cells of one row that
            differ in more than their seed, training runs and measurements in one group, a cell that starts from one of
            another study, one that starts from another where cells may diverge, or claims without protocol or verdicts.
    """

    name: str
    title: str
    question: str
    cells: tuple[Cell, ...]
    findings: Callable[[list[dict[str, Any]]], list[str]]
    notes: Mapping[str, str] = field(default_factory=dict)
    headline: Mapping[str, str] = field(default_factory=dict)
    may_diverge: bool = False
    claims: tuple[Claim, ...] = ()
    protocol: str = ""
    verdicts: Callable[[list[dict[str, Any]]], dict[str, Verdict]] | None = None
    curves: Mapping[str, tuple[Curve | Sweep, ...]] = field(default_factory=dict)
    size: Size = "here"

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError(f"study {self.name} has no cells")
        rows: dict[tuple[str, str], list[Cell]] = {}
        names: set[str] = set()
        for cell in self.cells:
            if cell.name in names:
                raise ValueError(f"study {self.name} has two cells named {cell.name!r}")
            names.add(cell.name)
            rows.setdefault((cell.group, cell.label), []).append(cell)
        for (group, label), cells in rows.items():
            if any(_but_seed(cell) != _but_seed(cells[0]) for cell in cells):
                raise ValueError(f"row {label!r} of group {group!r} has cells that differ in more than their seed")
            if len({c.seed for c in cells}) != len(cells):
                raise ValueError(f"row {label!r} of group {group!r} has the same seed twice")
        for cell in self.cells:
            if cell.after is not None and cell.after not in self.cells:
                raise ValueError(f"cell {cell.name} starts from {cell.after.name}, which is no cell of {self.name}")
            if cell.after is not None and self.may_diverge:
                raise ValueError(f"cell {cell.name} starts from {cell.after.name}, which may diverge")
        for group in dict.fromkeys(cell.group for cell in self.cells):
            if len({cell.command == "measure" for cell in self.cells if cell.group == group}) > 1:
                raise ValueError(f"group {group!r} has training runs and measurements; give them groups of their own")
        if self.claims and (self.verdicts is None or not self.protocol.strip()):
            raise ValueError(f"study {self.name} has claims; it needs a protocol and verdicts, too")
        for what, groups in (("notes", self.notes), ("headlines", self.headline), ("curves", self.curves)):
            unknown = set(groups) - {cell.group for cell in self.cells}
            if unknown:
                raise ValueError(f"study {self.name} has {what} for groups without cells: {sorted(unknown)}")


def _but_seed(cell: Cell) -> tuple[Any, ...]:
    """What the cells of a row have in common."""
    return cell.command, cell.recipe, dict(cell.options), cell.after and (cell.after.group, cell.after.label)


def train_command(cell: Cell, run: Path, *, data_dir: Path | None = None) -> list[str]:
    """The command line that trains or measures a cell into the run directory `run`, on one thread.

    A cell that starts from another is fine-tuned; that one's run directory lies next to `run`. Underscores in option
    names become dashes, True becomes `--flag`, False `--no-flag` (where the option may also be None, `--flag True` and
    `--flag False`), a list several values.

    >>> cell = Cell(name="a", group="g", label="l", recipe="digits", options={"ema": False, "lr": 1e-3}, seed=3)
    >>> " ".join(train_command(cell, Path("runs/a"))[3:])
    'train digits --no-ema --lr 0.001 --seed 3 --threads 1 --run-dir runs/a --overwrite --no-report --json'
    """
    if cell.command == "measure":
        return _measure_command(cell, run, data_dir)
    words = [sys.executable, "-m", "paradepth"]
    if cell.after is None:
        words += [cell.command, cell.recipe]
    else:
        words += ["finetune", str(run.parent / cell.after.name), "--task", cell.recipe]
    for option, value in cell.options.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool) and option not in _CHOICES:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}")
            words += [str(item) for item in (value if isinstance(value, (list, tuple)) else (value,))]
    words += ["--seed", str(cell.seed), "--threads", "1"]
    if data_dir is not None and not cell.embedded:
        words += ["--data-dir", str(data_dir / cell.folder)]
    words += ["--run-dir", str(run), "--overwrite"]
    return [*words, *(["--no-report"] if cell.command == "train" else []), "--json"]


def _measure_command(cell: Cell, run: Path, data_dir: Path | None) -> list[str]:
    words = [sys.executable, "-m", "paradepth.studies.measure", cell.recipe]
    words += ["--options", json.dumps(dict(cell.options)), "--seed", str(cell.seed)]
    if data_dir is not None and not cell.embedded:
        words += ["--data-dir", str(data_dir / cell.folder)]
    if cell.after is not None:
        words += ["--source", str(run.parent / cell.after.name)]
    return [*words, "--run-dir", str(run)]


def resume_command(cell: Cell, run: Path) -> list[str]:
    """The command line that goes on with the interrupted run of a cell."""
    words = [sys.executable, "-m", "paradepth", "resume", str(run)]
    return [*words, *(["--no-report"] if cell.command == "train" else []), "--json"]
