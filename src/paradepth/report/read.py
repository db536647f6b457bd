"""Read a run directory into one checked object.

A run directory is the only hand-over between commands (`config.json`, `environment.json`, `metrics.jsonl`,
`evaluation.json`). Everything here is plain JSON; whatever is missing or damaged is refused with the file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from paradepth.report.confusion import check_confusion
from paradepth.report.examples import check_examples, short
from paradepth.report.kinds import Kind, kind_of
from paradepth.report.measures import Measure, measure

DATA_NAMES = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny_shakespeare": "Tiny Shakespeare",
    "sst2": "SST-2",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "rte": "RTE",
    "qnli": "QNLI",
    "mnli": "MNLI",
    "qqp": "QQP",
    "ud_english_ewt": "UD English EWT",
    "multi30k": "Multi30k",
}
NO_MEASURES = ("contribution", "class_names", "confusion", "examples")  # lists in an evaluation that are something else


@dataclass(frozen=True)
class Run:
    """One run directory. Accuracies are fractions, times are seconds, lists by prefix start with prefix 1.

    Attributes:
        path: the directory.
        config, environment: the two JSON files as they are.
        start: the `start` event (parameters, FLOPs, layers, budget, sizes of the splits).
        train, validation, stages, probes, lipschitz: the events of that name in order, without those a resume has
            replaced.
        interruptions: `interrupted` and `resumed` events.
        end: the `end` event, or None when training did not finish.
        evaluation: `evaluation.json`, or None when the run was never evaluated.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    start: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]
    validation: tuple[Mapping[str, Any], ...]
    stages: tuple[Mapping[str, Any], ...]
    probes: tuple[Mapping[str, Any], ...]
    lipschitz: tuple[Mapping[str, Any], ...]
    interruptions: tuple[Mapping[str, Any], ...]
    end: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None

    @cached_property
    def model(self) -> Mapping[str, Any]:
        """The model's shape; of an encoder of the transformers library with the fields of its own configuration."""
        shape = self.config["model"]
        inner = shape.get("hf")
        if not isinstance(inner, Mapping):
            return shape
        found = {"encoder": inner.get("model_type"), "depth": inner.get("num_hidden_layers")}
        found |= {"width": inner.get("hidden_size"), "vocab_size": inner.get("vocab_size")}
        return {key: value for key, value in found.items() if value is not None} | {
            key: value for key, value in shape.items() if key != "hf"
        }

    @property
    def training(self) -> Mapping[str, Any]:
        return self.config["training"]

    @cached_property
    def kind(self) -> Kind:
        """What belongs to this kind of run."""
        return kind_of(self.config.get("model_type"), self.training.get("data"))

    @property
    def unit(self) -> str:
        """What a sample is, in the plural."""
        return self.kind.unit(self.model)

    @property
    def options(self) -> Mapping[str, Any]:
        """The training options that mean something to this kind of run."""
        return {name: value for name, value in self.training.items() if not self.kind.foreign(name, value)}

    @property
    def branches(self) -> int:
        """Number of branches; 0 for a serial stack."""
        return int(self.model.get("branches") or 0)

    @property
    def label(self) -> str:
        """Short name of the model, e.g. "PF 4×2" or "serial depth 8"; of an encoder of another library its type."""
        depth = self.model.get("depth", "?")
        if "encoder" in self.model:
            return f"{self.model['encoder']} depth {depth}"
        if depths := self.model.get("depths"):
            return "PF " + " + ".join(f"{len(list(group))}×{each}" for each, group in groupby(depths))
        return f"PF {self.branches}×{depth}" if self.branches else f"serial depth {depth}"

    @property
    def data(self) -> str:
        name = str(self.training.get("data", "unnamed data"))
        return DATA_NAMES.get(name, name)

    @property
    def schedule(self) -> str:
        """The schedule; empty for a serial stack, which has only one way to learn."""
        return str(self.training.get("schedule") or "") if self.branches > 1 else ""

    @cached_property
    def last(self) -> Mapping[str, Any]:
        """The event that holds the totals: `end`, or the latest one that was logged."""
        if self.end is not None:
            return self.end
        return max((*self.train, *self.validation), key=lambda event: number(event, "step"), default={})

    @property
    def layer_evals(self) -> float:
        return number(self.last, "layer_evals", 0.0)

    @property
    def seconds(self) -> float:
        return number(self.last, "seconds")

    @property
    def flops(self) -> float:
        return number(self.last, "flops")

    @property
    def final(self) -> Mapping[str, Any]:
        """Where the final figures are: the test evaluation, else the last validation, else nothing."""
        return self.evaluation or (self.validation[-1] if self.validation else {})

    def values(self, key: str) -> list[float]:
        """Final values of a measure by prefix, of a validation those in use; empty where it was not measured."""
        found = self.final.get(key) or []
        found = found if self.evaluation is not None else found[: self.active]
        return [math.nan if value is None else float(value) for value in found]

    @property
    def accuracy(self) -> list[float]:
        """Final accuracy by prefix."""
        return self.values("accuracy")

    def measure(self, key: str) -> Measure:
        """A measure, under the name it has in this kind of run."""
        found = measure(key)
        return replace(found, name=self.kind.names.get(key, found.name))

    @cached_property
    def measures(self) -> list[Measure]:
        """Everything that was measured of every prefix, in the order of the files."""
        keys = [key for key, value in self.final.items() if key not in NO_MEASURES and is_numbers(value)]
        return [self.measure(key) for key in keys if len(self.final[key]) == len(self.final["accuracy"])]

    @cached_property
    def main(self) -> Measure:
        """The measure that the run is judged by."""
        return self.measure(next((key for key in self.kind.main if self.final.get(key)), "accuracy"))

    @cached_property
    def curve(self) -> Measure:
        """What validations have that is nearest to `main`."""
        found = (key for key in self.kind.main if any(event.get(key) for event in self.validation))
        return self.measure(next(found, "accuracy"))

    @property
    def active(self) -> int | None:
        """Branches in use at the last validation; None where that is not logged."""
        return self.validation[-1].get("active") if self.validation else None

    @property
    def split(self) -> str:
        """Where the final figures come from."""
        return str(self.evaluation.get("split", "test")) if self.evaluation is not None else "validation"

    @property
    def contribution(self) -> list[float]:
        return [math.nan if value is None else float(value) for value in self.final.get("contribution") or []]

    @property
    def class_names(self) -> list[str]:
        names = (self.evaluation or {}).get("class_names") or self.model.get("class_names")
        return [str(name) for name in names or range(int(self.model.get("num_classes") or 0))]


def number(event: Mapping[str, Any], key: str, default: float = math.nan) -> float:
    """`event[key]` as a float; `default` when it is missing or null."""
    value = event.get(key)
    return default if value is None else float(value)


def read_run(path: Path) -> Run:
    """Read one run directory.

    Raises:
        ValueError: a file is missing, empty or damaged; the message names the file and, in it, the line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a run directory: {'it is a file' if path.exists() else 'it does not exist'}")
    config = _read_object(path / "config.json")
    for key in ("model", "training"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{path / 'config.json'}: {key!r} is {config.get(key)!r}, expected an object")
    environment = _read_object(path / "environment.json")
    events: dict[str, list[dict[str, Any]]] = {}
    for event in _read_events(path / "metrics.jsonl"):
        if event["event"] == "resumed":
            _forget_after(events, number(event, "step"))
        events.setdefault(event["event"], []).append(event)
    if "start" not in events:
        raise ValueError(
            f"{path / 'metrics.jsonl'}, line 1: no 'start' event; the log is not complete from its beginning"
        )
    evaluation = path / "evaluation.json"
    run = Run(
        path=path,
        config=config,
        environment=environment,
        start=events["start"][0],
        train=tuple(events.get("train", ())),
        validation=tuple(events.get("validation", ())),
        stages=tuple(events.get("stage", ())),
        probes=tuple(events.get("probe", ())),
        lipschitz=tuple(events.get("lipschitz", ())),
        interruptions=tuple(events.get("interrupted", [])) + tuple(events.get("resumed", [])),
        end=events["end"][-1] if "end" in events else None,
        evaluation=_read_object(evaluation) if evaluation.exists() else None,
    )
    if run.evaluation is not None:
        _check_evaluation(run.evaluation, evaluation, run.class_names)
    return run


def _forget_after(events: dict[str, list[dict[str, Any]]], step: float) -> None:
    """Drop what was logged after the checkpoint a run resumed from: the resumed run logs those steps again."""
    for name in ("train", "validation", "stage", "probe", "lipschitz", "end"):
        if name in events:
            events[name] = [event for event in events[name] if number(event, "step") <= step]
    if not events.get("end", True):
        del events["end"]


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {path.parent} is not a complete run directory") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not raw.strip():
        raise ValueError(f"{path}, line 1: the file is empty")
    return raw


def _parse(text: bytes, path: Path, first_line: int) -> dict[str, Any]:
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}, line {first_line}: nested too deeply to be read") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {first_line}: a {type(value).__name__}, expected an object")
    return value


def _read_object(path: Path) -> dict[str, Any]:
    return _parse(_read_bytes(path), path, 1)


def read_part(path: Path, needed: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object of a file that not every run has; None where there is none.

    Args:
        path: the file.
        needed: keys that it must have.

    Raises:
        ValueError: a damaged file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"{path} is damaged: it has no {missing[0]!r}")
    return found


NUMBERS = {
    "start": ("parameters",),
    "train": ("step", "layer_evals"),
    "validation": ("step", "layer_evals"),
    "stage": ("layer_evals", "active"),
    "resumed": ("step",),
    "probe": ("step",),
    "lipschitz": ("step",),
    "end": ("layer_evals",),
}
OPTIONAL_NUMBERS = ("step", "layer_evals", "flops", "seconds", "learning_rate", "samples_per_second", "layers")
LISTS = {"start": ("parameters_by_prefix",), "validation": ("loss", "accuracy")}
OPTIONAL_LISTS = ("contribution", "forward_flops", "estimates")


def _read_events(path: Path) -> Iterator[dict[str, Any]]:
    # Only a line that ends is whole: a process killed while writing leaves a part of one, which resuming cuts off.
    for line_number, line in enumerate(_read_bytes(path).split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        event, where = _parse(line, path, line_number), f"{path}, line {line_number}"
        name = event.get("event")
        if not isinstance(name, str):
            raise ValueError(f"{where}: 'event' is {name!r}, expected the name of an event")
        for key in NUMBERS.get(name, ()):
            if not _is_number(event.get(key)):
                raise ValueError(f"{where}: {key!r} of a {name} event is {event.get(key)!r}, expected a number")
        scalars = OPTIONAL_NUMBERS + (("loss", "accuracy") if name == "train" else ())
        for key in scalars:
            if event.get(key) is not None and not _is_number(event[key]):
                raise ValueError(f"{where}: {key!r} of a {name} event is {event[key]!r}, expected a number")
        for key in LISTS.get(name, ()):
            _check_numbers(event.get(key), f"{where}: {key!r} of a {name} event")
        for key in OPTIONAL_LISTS:
            if event.get(key):
                _check_numbers(event[key], f"{where}: {key!r} of a {name} event")
        yield event


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_numbers(value: object) -> bool:
    """Whether a value is a list of numbers, some of which may be missing, and not empty."""
    return isinstance(value, list) and bool(value) and all(item is None or _is_number(item) for item in value)


def _check_numbers(value: object, what: str) -> None:
    if not is_numbers(value):
        raise ValueError(f"{what} is {short(value)}, expected a list of numbers")


def _check_evaluation(evaluation: Mapping[str, Any], path: Path, names: list[str]) -> None:
    _check_numbers(evaluation.get("accuracy"), f"{path}: 'accuracy'")
    for key in ("loss", "contribution"):
        if evaluation.get(key):
            _check_numbers(evaluation[key], f"{path}: {key!r}")
    if not isinstance(evaluation.get("notes") or [], list):
        raise ValueError(f"{path}: 'notes' is {short(evaluation['notes'])}, expected a list of sentences")
    if not isinstance(evaluation.get("signatures") or {}, dict):
        raise ValueError(f"{path}: 'signatures' is {short(evaluation['signatures'])}, expected an object")
    confusion = evaluation.get("confusion") or []
    check_confusion(confusion, len(names), path)
    check_examples(evaluation.get("examples") or [], names, path)
