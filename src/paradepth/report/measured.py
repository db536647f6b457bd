"""Parts of a study's page that are no training curves: tables of what was measured, and lines over a quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from paradepth.report import figure, text
from paradepth.report.figure import Plot
from paradepth.report.measures import Measure, is_known, measure, spread
from paradepth.report.plots import draw, percent

Points = Sequence[tuple[float, Sequence[float]]]  # x, values of the seeds


def measured_table(group: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a group of measurements: a column for each measure that is a number, mean ± sd over the seeds.

    Measures that are lists are left to the group's plots. What a measurement did not give of parameters, layers and
    layer evaluations has no column.
    """
    rows = group["rows"]
    keys = [key for key in group["measures"] if any(_is_number(row, key) for row in rows)]
    measures = [measure(key) for key in keys]
    spent = [key for key in ("layers", "parameters", "layer_evals") if any(key in row for row in rows)]
    return {
        "columns": [found.title for found in measures],
        "spent": [key.replace("_evals", "_evaluations").replace("_", " ") for key in spent],
        "rows": [
            {
                "label": row["label"],
                "cells": [_cell(row, found) for found in measures],
                "seeds": len(row["seeds"]),
                "spent": [_spent(row, key) for key in spent],
                "seconds": text.duration(float(np.mean(row["seconds"]))),
            }
            for row in rows
        ],
    }


def check_measured(group: Mapping[str, Any]) -> None:
    """Refuse a group of measurements that does not fit together.

    Raises:
        ValueError: a row without label, seeds or measures, or a measure without an entry for each seed.
    """
    for row in group["rows"]:
        where = f"group {group.get('name')!r}, row {row.get('label')!r}"
        for key in ("label", "seeds", "seconds", "measures"):
            if not row.get(key):
                raise ValueError(f"{where}: {key!r} is missing")
        for key, values in row["measures"].items():
            if len(values) != len(row["seeds"]):
                raise ValueError(f"{where}: {key!r} has {len(values)} entries for {len(row['seeds'])} seeds")


def line_plot(drawn: Mapping[str, Any], name: str) -> Plot | None:
    """A plot as `paradepth.studies.lines.lines` describes it: the mean over the seeds, and their range as a shade.

    Args:
        drawn: `measure`, `title`, `x_title`, `log_x`, `log_y`, and `lines` of `label` and `points`. Points that a
            logarithmic axis cannot show are left out.
        name: unique on the page.

    Returns:
        The plot, or None where there is nothing to draw.
    """
    what = measure(drawn["measure"])
    lines = [(line["label"], _visible(line["points"], drawn, what.factor)) for line in drawn["lines"]]
    lines = [(label, points) for label, points in lines if points]
    if not lines:
        return None
    canvas, axes = figure.panel(300)
    for number, (_, points) in enumerate(lines):
        xs = [x for x, _ in points]
        low, high = ([choose(values) for _, values in points] for choose in (min, max))
        if any(a < b for a, b in zip(low, high, strict=True)):
            axes.fill_between(xs, low, high, color=figure.series(number), alpha=0.12, linewidth=0)
        means = [float(np.mean(values)) for _, values in points]
        draw(axes, (xs, means), figure.series(number), pattern=figure.dash(number), width=1.5)
        axes.scatter(xs, means, s=14, color=figure.series(number), linewidths=0, zorder=3)
    axes.set_xlabel(drawn["x_title"])
    xs = sorted({x for _, points in lines for x, _ in points})
    if drawn["log_x"]:
        axes.set_xscale("log")
        _few_ticks(axes, xs)
    elif all(float(x).is_integer() for x in xs):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if drawn["log_y"]:
        figure.log_y(axes)
    title = drawn["title"] or f"{what.name[:1].upper()}{what.name[1:]}"
    legend = [figure.key(label, figure.series(n), figure.dash(n)) for n, (label, _) in enumerate(lines) if label]
    svg = figure.to_svg(canvas, name, f"{title} over {drawn['x_title']}")
    several = any(len(values) > 1 for _, points in lines for _, values in points)
    note = "Mean of the seeds; shade: their range." if several else ""
    return Plot(f"{title}{percent(what)}", svg, note, legend)


def _visible(points: Points, drawn: Mapping[str, Any], factor: float) -> list[tuple[float, list[float]]]:
    found = []
    for x, values in points:
        kept = [factor * value for value in values if math.isfinite(value) and (value > 0 or not drawn["log_y"])]
        if kept and math.isfinite(x) and (x > 0 or not drawn["log_x"]):
            found.append((x, kept))
    return found


def _few_ticks(axes: Axes, xs: Sequence[float]) -> None:
    """Ticks at the x values themselves, as long as they have room."""
    if len(xs) > 8:
        xs = [x for place, x in enumerate(xs) if place % math.ceil(len(xs) / 8) == 0]
    axes.xaxis.set_major_locator(FixedLocator(list(xs)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text.significant(x)))


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    values = row["measures"].get(key)
    return bool(values) and not isinstance(values[0], Sequence)


def _cell(row: Mapping[str, Any], what: Measure) -> str:
    if not _is_number(row, what.key):
        return text.MISSING
    mean, deviation = spread(row["measures"][what.key])
    if not is_known(what.key):
        return text.plus_minus(mean, deviation)
    shown = what.show(mean, bare=True)
    return shown if math.isnan(deviation) else f"{shown} ± {what.show(deviation, bare=True)}"


def _spent(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return text.MISSING
    return f"{row[key]:g}" if key == "layers" else text.count(row[key])
