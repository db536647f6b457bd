"""From run directories to the records of cells."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paradepth.studies.study import Cell

# Chosen by name: `command` and whatever comes later may hold paths of the machine.
ENVIRONMENT = (
    "paradepth",
    "python",
    "torch",
    "platform",
    "cpu",
    "cores",
    "threads",
    "device",
    "precision",
    "world_size",
)
# Of evaluation.json, what stands elsewhere in a record or is no measure.
_OTHER = ("accuracy", "loss", "contribution", "class_names", "confusion", "examples")
MEASURED = "measured.json"  # of a measurement, in its run directory: written last
SPENT = ("parameters", "layers", "layer_evals")  # what a measurement may give besides its measures


def read_run(cell: Cell, run: Path) -> dict[str, Any]:
    """The record of a finished cell.

    Args:
        cell: its definition.
        run: its run directory.

    Returns:
        Of a measurement the fields of the cell and `options_hash`; `measures` (a number or a list of numbers by name),
        `seconds`, `environment`, and what the measurement gave of `parameters`, `layers` and `layer_evals`. Otherwise
        The fields of the cell and `options_hash`; `parameters`, `layers`, `layer_evals`, `flops`, `seconds`;
        `accuracy`, `loss` (test, per prefix), `measures` (whatever else was measured of every prefix, by name),
        `contribution` (per branch), `validation_accuracy`, `validation_loss` (last, per prefix); `curve` and
        `loss_curve` ([layer_evals, validation accuracy, or loss, of the full model] …), `stages` (stage events),
        `environment` (without paths) and `signatures` of the measures that have one.

    Raises:
        ValueError: the run is not finished or a file is damaged; the message names the file.
    """
    if cell.command == "measure":
        return _read_measured(cell, run)
    events = read_events(run / "metrics.jsonl")
    evaluation = _read_json(run / "evaluation.json")
    environment = _environment(run)
    _read_json(run / "config.json")  # not copied, but a run without it is not a finished run
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    for kind in ("start", "validation", "end"):
        if kind not in by_kind:
            raise ValueError(f"{run / 'metrics.jsonl'} has no {kind!r} event: the run is not finished")
    start, end = by_kind["start"][-1], by_kind["end"][-1]
    if not evaluation.get("accuracy"):
        raise ValueError(f"{run / 'evaluation.json'} has no test accuracy")
    prefixes = len(evaluation["accuracy"])
    validations = by_kind["validation"]
    try:
        return {
            **definition(cell),
            "parameters": start["parameters"],
            "layers": start["layers"],
            "layer_evals": end["layer_evals"],
            "flops": end["flops"],
            "seconds": end["seconds"],
            "accuracy": evaluation["accuracy"],
            "validation_accuracy": validations[-1]["accuracy"],
            "validation_loss": validations[-1]["loss"],
            "loss": evaluation["loss"],
            "measures": {key: v for key, v in evaluation.items() if key not in _OTHER and _is_measure(v, prefixes)},
            "signatures": evaluation.get("signatures", {}),
            "contribution": evaluation["contribution"],
            "curve": [[event["layer_evals"], event["accuracy"][-1]] for event in validations],
            "loss_curve": [[event["layer_evals"], event["loss"][-1]] for event in validations],
            "stages": by_kind.get("stage", []),
            "environment": environment,
        }
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{run}: metrics.jsonl or evaluation.json lacks {error}") from error


def _read_measured(cell: Cell, run: Path) -> dict[str, Any]:
    found, environment = _read_json(run / MEASURED), _environment(run)
    if not isinstance(found.get("measures"), dict) or "seconds" not in found:
        raise ValueError(f"{run / MEASURED} has no measures: {found.get('diverged', 'it is damaged')}")
    return {
        **definition(cell),
        **{key: found[key] for key in (*SPENT, "seconds", "measures") if key in found},
        "environment": environment,
    }


def read_diverged(cell: Cell, run: Path) -> dict[str, Any] | None:
    """The record of a cell whose run stopped because its loss or its gradient was not finite.

    Args:
        cell: its definition.
        run: its run directory.

    Returns:
        The fields of the cell, `parameters`, `layers`, what it spent until then (`layer_evals`, `flops`, `seconds`),
        `diverged` (the step; of a measurement, what was not finite) and `environment`; None for a run that did not end
        so.
    """
    try:
        if cell.command == "measure":
            found, environment = _read_json(run / MEASURED), _environment(run)
            if "diverged" not in found:
                return None
            return {
                **definition(cell),
                "seconds": found["seconds"],
                "diverged": found["diverged"],
                "environment": environment,
            }
        events, environment = read_events(run / "metrics.jsonl"), _environment(run)
        if not events or events[-1]["event"] != "diverged":
            return None
        start = next(event for event in events if event["event"] == "start")
        return {
            **definition(cell),
            "parameters": start["parameters"],
            "layers": start["layers"],
            **{key: events[-1][key] for key in ("layer_evals", "flops", "seconds")},
            "diverged": events[-1]["step"],
            "environment": environment,
        }
    except (KeyError, StopIteration, ValueError):
        return None


def _environment(run: Path) -> dict[str, Any]:
    """What a record keeps of a run's environment."""
    found = _read_json(run / "environment.json")
    return {key: found[key] for key in ENVIRONMENT if key in found}


def _is_measure(value: object, prefixes: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == prefixes
        and all(item is None or (isinstance(item, int | float) and not isinstance(item, bool)) for item in value)
    )


def measured(record: dict[str, Any], key: str) -> list[float]:
    """A measure of a record by prefix, of the test split; of a measurement, a list of its one value, or its list.

    Raises:
        ValueError: it was not measured; the message names what was.

    >>> measured({"name": "a", "accuracy": [0.5], "loss": [1.0], "measures": {"bleu": [30.1]}}, "bleu")
    [30.1]
    >>> measured({"name": "b", "command": "measure", "measures": {"error": 0.1}}, "error")
    [0.1]
    """
    found = {name: record[name] for name in ("accuracy", "loss") if name in record} | record.get("measures", {})
    if key not in found:
        raise ValueError(f"the record of {record['name']} has no {key!r}; measured are {', '.join(found)}")
    return found[key] if isinstance(found[key], list) else [found[key]]


def last(records: Iterable[dict[str, Any]], key: str) -> list[float]:
    """A measure of several records: of each the value of the full model, or of a measurement the one that it gave.

    >>> last([{"accuracy": [0.5, 0.6]}, {"accuracy": [0.4, 0.7]}], "accuracy")
    [0.6, 0.7]
    """
    return [measured(record, key)[-1] for record in records]


def by_row(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The records of each group by label, one for each seed; groups and labels in the order in which they are met.

    >>> by_row([{"group": "images", "label": "serial"}])
    {'images': {'serial': [{'group': 'images', 'label': 'serial'}]}}
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        found.setdefault(record["group"], {}).setdefault(record["label"], []).append(record)
    return found


def definition(cell: Cell) -> dict[str, Any]:
    """The fields of a cell as they stand in its record."""
    return {
        "name": cell.name,
        "group": cell.group,
        "label": cell.label,
        "recipe": cell.recipe,
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in cell.options.items()},
        "seed": cell.seed,
        **({} if cell.after is None else {"after": cell.after.name}),
        **({} if cell.command == "train" else {"command": cell.command}),
        "options_hash": cell.options_hash,
    }


def read_record(cell: Cell, out: Path, *, may_diverge: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The stored record of a cell, with the group and label of its present definition.

    Args:
        cell: its definition.
        out: the study's folder.
        may_diverge: whether the record of a run that diverged will do.

    Returns:
        (record, "") or, where it counts as missing, (None, why); the reason is "" where it was simply never made.
    """
    path = out / "cells" / f"{cell.name}.json"
    if not path.exists():
        return None, ""
    try:
        record = _read_json(path)
    except ValueError as error:
        return None, str(error)
    if record.get("options_hash") != cell.options_hash:
        return None, f"{path} was made with other options"
    if "diverged" in record and not may_diverge:
        return None, f"{path} is the record of a run that diverged"
    return {**record, **definition(cell)}, ""


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run's `metrics.jsonl` as if it had never been interrupted.

    Raises:
        ValueError: the file cannot be read, or a line is damaged.
    """
    events: list[dict[str, Any]] = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged: {error}") from error
        if kind == "resumed":
            # What a killed process logged after its last checkpoint has been computed, and logged, again.
            events = [old for old in events if old.get("step", 0) <= event["step"]]
        events.append(event)
    return events


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value
