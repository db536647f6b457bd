"""From the records of a study's cells to the input of its report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from paradepth.studies.claim import Verdict
from paradepth.studies.lines import lines
from paradepth.studies.record import ENVIRONMENT, SPENT, by_row, measured, read_record
from paradepth.studies.study import Cell, Study

_CLASSES = ("accuracy", "f1", "matthews")  # the accuracy of validations tells the course of these; else the loss
_MATCHED = 0.02  # rows whose compute differs by more than this part are not a matched comparison


def collect(study: Study, out: Path) -> dict[str, Any]:
    """Gather a study's finished cells into the input of `paradepth.report.write_study_report`.

    Args:
        study: the study.
        out: its folder, as given to `run_study`.

    Returns:
        `name`, `title`, `question`, `protocol`, `claims` (each with its verdict and figure, empty as long as cells are
        missing), `findings`, `groups` (each `name`, `note`, `measure` and `curve`, or of measurements `measures`,
        `drawn` (plots, as `paradepth.studies.lines.lines` makes them) and `rows`; a row holds one entry a seed),
        `environment`, `size`, `command` and `missing` (names of cells without a valid record). Groups and rows stand in
        the order of the study's definition. A group's note says what is missing, whether its rows differ in compute,
        which cells diverged, and the signature of its measure.

    Raises:
        ValueError: a record without a measure that its group is compared by or that is drawn, or verdicts that are not
            those of the study's claims.
    """
    records: list[dict[str, Any]] = []
    missing: list[Cell] = []
    for cell in study.cells:
        record, _ = read_record(cell, Path(out), may_diverge=study.may_diverge)
        if record is None:
            missing.append(cell)
        else:
            records.append(record)
    if missing:
        findings = [f"No findings yet: {len(missing)} of {len(study.cells)} cells are missing."]
    else:
        findings = study.findings(records)
    return {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "findings": findings,
        "groups": [_group(study, name, records, missing) for name in dict.fromkeys(c.group for c in study.cells)],
        "environment": _common_environment([record["environment"] for record in records]),
        "claims": _claims(study, records if not missing else None),
        "protocol": study.protocol,
        "size": study.size,
        "command": f"paradepth study {study.name}" + ("" if study.size == "here" else f" --size {study.size}"),
        "missing": [cell.name for cell in missing],
    }


def _group(study: Study, name: str, records: list[dict[str, Any]], missing: list[Cell]) -> dict[str, Any]:
    measures = any(cell.command == "measure" for cell in study.cells if cell.group == name)
    of_group = [record for record in records if record["group"] == name and "diverged" not in record]
    lost = [record for record in records if record["group"] == name and "diverged" in record]
    measure = study.headline.get(name, "accuracy")
    curve = "accuracy" if measure in _CLASSES else "loss"
    by_label = by_row(of_group).get(name, {})
    rows = [_measured_row(found) if measures else _row(found, measure, curve) for found in by_label.values()]
    signatures = dict.fromkeys(s for record in of_group if (s := record.get("signatures", {}).get(measure)))
    remarks = [study.notes.get(name, ""), _compute_remark(rows), *(f"Signature: {s}." for s in signatures)]
    if lost:
        where = (f"{record['label']} (seed {record['seed']}, {_lost_at(record)})" for record in lost)
        remarks.append(f"Not in table and plots, because they diverged: {', '.join(where)}.")
    if absent := [cell.name for cell in missing if cell.group == name]:
        remarks.append(f"Missing cells: {', '.join(absent)}.")
    return {
        "name": name,
        "note": " ".join(filter(None, remarks)),
        **({"measures": _names(rows)} if measures else {"measure": measure, "curve": curve}),
        "drawn": [lines(plot, list(by_label.values())) for plot in study.curves.get(name, ())],
        "rows": rows,
    }


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The measures of a group, in the order in which they are met."""
    return list(dict.fromkeys(key for row in rows for key in row["measures"]))


def _lost_at(record: dict[str, Any]) -> str:
    lost = record["diverged"]
    return lost if isinstance(lost, str) else f"step {lost}"


def _claims(study: Study, records: list[dict[str, Any]] | None) -> list[dict[str, str]]:
    """Each claim with its verdict and figure, empty without the records of all cells."""
    verdicts = verdicts_of(study, records) if records is not None else {}
    return [
        {**asdict(claim), **(asdict(verdicts[claim.name]) if verdicts else {"verdict": "", "figure": ""})}
        for claim in study.claims
    ]


def verdicts_of(study: Study, records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """The study's verdict for each of its claims, from the records of all its cells.

    Raises:
        ValueError: a claim without a verdict, or a verdict without a claim.
    """
    verdicts = study.verdicts(records) if study.verdicts is not None else {}
    names = [claim.name for claim in study.claims]
    if set(verdicts) != set(names):
        raise ValueError(f"study {study.name} has verdicts for {sorted(verdicts)}, and claims {sorted(names)}")
    return verdicts


def _measured_row(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One table row of measurements: each measure with one entry for each seed."""
    first = records[0]
    return {
        "label": first["label"],
        "recipe": first["recipe"],
        "options": first["options"],
        **{key: sum(r[key] for r in records) / len(records) for key in SPENT if all(key in r for r in records)},
        "seeds": [record["seed"] for record in records],
        "seconds": [record["seconds"] for record in records],
        "measures": {key: [record["measures"][key] for record in records] for key in first["measures"]},
    }


def _row(records: list[dict[str, Any]], measure: str, curve: str) -> dict[str, Any]:
    """One table row: what its seeds share, and one list entry for each seed of what they do not."""
    first = records[0]
    per_seed = {"seeds": "seed", "curves": "curve" if curve == "accuracy" else "loss_curve"} | {
        key: key for key in ("accuracy", "validation_accuracy", "loss", "contribution", "stages", "flops", "seconds")
    }
    return {
        "label": first["label"],
        "recipe": first["recipe"],
        "options": first["options"],
        "layers": first["layers"],
        "parameters": first["parameters"],
        "layer_evals": sum(record["layer_evals"] for record in records) / len(records),
        **{plural: [record[key] for record in records] for plural, key in per_seed.items()},
        measure: [measured(record, measure) for record in records],
    }


def _compute_remark(rows: list[dict[str, Any]]) -> str:
    evals = [row["layer_evals"] for row in rows if "layer_evals" in row]
    if not evals or max(evals) - min(evals) <= _MATCHED * max(evals):
        return ""
    return f"Not matched in compute: from {min(evals):.3g} to {max(evals):.3g} layer evaluations."


def _common_environment(environments: list[dict[str, Any]]) -> dict[str, Any]:
    """What the cells agree on; where they do not, all values that occur."""
    common: dict[str, Any] = {}
    for key in ENVIRONMENT:
        values = list(dict.fromkeys(str(environment[key]) for environment in environments if key in environment))
        if len(values) == 1:
            common[key] = next(environment[key] for environment in environments if key in environment)
        elif values:
            common[key] = " / ".join(values)
    return common
