"""Measurements: what a cell of a study does that is no training run. One file each, imported only where it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

MEASUREMENTS: dict[str, str] = {
    "approximation": "paradepth.studies.measurements.approximation",
    "probes": "paradepth.studies.measurements.probes",
    "composition": "paradepth.studies.measurements.composition",
    "closed_form": "paradepth.studies.measurements.closed_form",
    "closed_form_architectures": "paradepth.studies.measurements.closed_form:architectures",
    "branch_sum": "paradepth.studies.measurements.branch_sum",
    "conversion": "paradepth.studies.measurements.conversion",
    "sentence_distance": "paradepth.studies.measurements.sentences:distance",
    "sentence_conversion": "paradepth.studies.measurements.sentences:conversion",
    "routing": "paradepth.studies.measurements.routing",
    "sharing": "paradepth.studies.measurements.sharing",
    "relaxation": "paradepth.studies.measurements.relaxation",
    "mixing_overhead": "paradepth.studies.measurements.mixing_overhead",
}
"""The module of each measurement, by its name; the function is called `measure`, or what stands behind a colon."""

Measurement = Callable[..., dict[str, float | list[float]]]
"""measure(*, seed: int, data_dir: Path | None, run_dir: Path, source: Path | None, **options) of keyword-only options.

`data_dir` is the folder of local data sets, `run_dir` an empty folder that is kept until the study is run again,
`source` the finished run directory of the cell that this one starts from. It returns figures by name: a number, or a
list of numbers, which is a curve. `parameters`, `layers` and `layer_evals` are taken for the columns of that name.
A `ValueError` refuses the options; a `FloatingPointError` says that something was not finite.
"""

_GIVEN = ("seed", "data_dir", "run_dir", "source")


def get_measurement(name: str) -> Measurement:
    """The measurement called `name`.

    Raises:
        ValueError: unknown measurement.
    """
    if name not in MEASUREMENTS:
        raise ValueError(f"unknown measurement {name!r}; known are {', '.join(sorted(MEASUREMENTS))}")
    module, _, function = MEASUREMENTS[name].partition(":")
    return getattr(import_module(module), function or "measure")


def check_measurement(name: str, options: Mapping[str, Any]) -> Measurement:
    """The measurement called `name`, which takes these options.

    Raises:
        ValueError: unknown measurement, an option that it does not have, or one that is missing.
    """
    function = get_measurement(name)
    parameters = {key: p for key, p in inspect.signature(function).parameters.items() if key not in _GIVEN}
    shown = ", ".join(parameters) or "none"
    if unknown := [option for option in options if option not in parameters]:
        raise ValueError(f"measurement {name} has no option {unknown[0]!r}; its options are {shown}")
    needed = [key for key, p in parameters.items() if p.default is p.empty and key not in options]
    if needed:
        raise ValueError(f"measurement {name} needs the option {needed[0]!r}; its options are {shown}")
    return function
