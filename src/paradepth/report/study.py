"""The page of a study: groups of configurations at one budget each, several seeds per configuration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paradepth.report import figure, plots, text
from paradepth.report.compare import matching, prefix_plot
from paradepth.report.figure import Plot
from paradepth.report.measured import check_measured, line_plot, measured_table
from paradepth.report.measures import Measure, measure, spread
from paradepth.report.page import render, write_page

LANE = 40  # height of one configuration in the strip plot


def write_study_report(study: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a study.

    Args:
        study: `name`, `title`, `question`, `claims` (`text`, `source`, `kind`, `verdict`, `figure`), `protocol`,
            `findings` (plain paragraphs), `groups`, `environment`, `command`. A group has `name`, `note`, `rows` and
            `drawn`, the plots of `line_plot`. One of training runs has `measure` (a key such as "accuracy", the
            default, "loss" or "bleu"); a row has `label`, `layers`, `parameters`, `layer_evals`, `seeds`, the measure
            under its key (by seed and prefix), `curves` (by seed, pairs of layer evaluations and what `curve`, a key,
            names, of the full model) and `seconds` (by seed). One of measurements has `measures`, the keys in order;
            a row has `label`, `seeds`, `seconds`, `measures` (by key and seed) and what is known of the others.
        out: the HTML file to write, replaced in one step.

    Raises:
        ValueError: something is missing or does not fit together; the message names the group and the row.
    """
    _check(study)
    with figure.style():
        # A configuration keeps its colour in every group.
        names = dict.fromkeys(row["label"] for group in study["groups"] for row in group["rows"])
        colors = {label: number for number, label in enumerate(names)}
        groups = [_group(group, number, colors) for number, group in enumerate(study["groups"])]
    return write_page(
        render(
            "study.html.j2",
            title=study["title"],
            subtitle=study.get("question", ""),
            claims=study.get("claims", []),
            protocol=study.get("protocol", ""),
            findings=study.get("findings", []),
            notices=[],
            groups=groups,
            environment=text.settings(study.get("environment", {})),
            command=study.get("command", ""),
        ),
        Path(out),
    )


def _check(study: Mapping[str, Any]) -> None:
    for key in ("title", "groups"):
        if not study.get(key):
            raise ValueError(f"study has no {key!r}; needed are 'title' and 'groups'")
    for group in study["groups"]:
        if not group.get("rows"):
            raise ValueError(f"group {group.get('name')!r} has no rows")
        if "measures" in group:
            check_measured(group)
            continue
        main = group.get("measure", "accuracy")
        for row in group["rows"]:
            where = f"group {group.get('name')!r}, row {row.get('label')!r}"
            for key in ("label", "layers", "parameters", "layer_evals", "seeds", main):
                if key not in row:
                    raise ValueError(f"{where}: {key!r} is missing")
            if not row["seeds"]:
                raise ValueError(f"{where}: no seeds")
            for key in (main, "curves", "seconds"):
                if row.get(key) and len(row[key]) != len(row["seeds"]):
                    raise ValueError(f"{where}: {key!r} has {len(row[key])} entries for {len(row['seeds'])} seeds")
            if not row[main] or {len(values) for values in row[main]} != {len(row[main][0])} or not row[main][0]:
                raise ValueError(f"{where}: {main!r} needs the same prefixes, at least one, for every seed")


def _group(group: Mapping[str, Any], number: int, colors: Mapping[str, int]) -> dict[str, Any]:
    lines = [line_plot(drawn, f"group{number}-lines{place}") for place, drawn in enumerate(group.get("drawn", []))]
    found = {"name": group.get("name", ""), "note": group.get("note", ""), "lines": [plot for plot in lines if plot]}
    if "measures" in group:
        return {**found, "table": measured_table(group), "matched": ""}
    return {**found, "table": None, **_trained(group, number, colors)}


def _trained(group: Mapping[str, Any], number: int, colors: Mapping[str, int]) -> dict[str, Any]:
    """Table and plots of a group of training runs."""
    main = measure(group.get("measure", "accuracy"))
    rows = sorted(group["rows"], key=lambda row: -main.worth(spread([values[-1] for values in row[main.key]])[0]))
    numbers = [colors[row["label"]] for row in rows]
    keys = [figure.key(row["label"], figure.series(n), figure.dash(n)) for row, n in zip(rows, numbers, strict=True)]
    drawn = [_strip(rows, numbers, f"group{number}-strip", main)]
    curves = _curves(rows, numbers, f"group{number}-curves", measure(group.get("curve", main.key)))
    lines = [_by_layers(row, main) for row in rows]
    several = []
    if any(len(xs) > 1 for xs, _, _ in lines):
        several = [prefix_plot(lines, keys, numbers, f"group{number}-prefixes", main)]
    return {
        "matched": matching([row["layer_evals"] for row in rows], [row["parameters"] for row in rows]),
        "plots": drawn + ([curves] if curves else []) + several,
        "legend": keys,
        "main": main,
        "prefixes": max(len(row[main.key][0]) for row in rows),
        "rows": [
            {**_row(row, main), "key": key, "best": place == 0}
            for place, (row, key) in enumerate(zip(rows, keys, strict=True))
        ],
    }


def _by_layers(row: Mapping[str, Any], main: Measure) -> tuple[list[float], list[float], list[float]]:
    count = len(row[main.key][0])
    pairs = [spread([main.factor * values[k] for values in row[main.key]]) for k in range(count)]
    deviations = [0.0 if math.isnan(deviation) else deviation for _, deviation in pairs]
    return [row["layers"] * (k + 1) / count for k in range(count)], [mean for mean, _ in pairs], deviations


def _row(row: Mapping[str, Any], main: Measure) -> dict[str, Any]:
    prefixes = len(row[main.key][0])
    pairs = [spread([values[k] for values in row[main.key]]) for k in range(prefixes)]
    mean, deviation = pairs[-1]
    seconds = row.get("seconds") or [math.nan]
    return {
        "label": row["label"],
        "mean": main.show(mean, bare=True),
        "deviation": "" if math.isnan(deviation) else f"± {main.show(deviation, bare=True)}",
        "seeds": len(row["seeds"]),
        "by_prefix": [main.show(value, bare=True) for value, _ in pairs] if prefixes > 1 else [],
        "layers": row["layers"],
        "parameters": text.count(row["parameters"]),
        "layer_evals": text.count(row["layer_evals"]),
        "seconds": text.duration(statistics.fmean(seconds)),
    }


def _strip(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], name: str, main: Measure) -> Plot:
    """One lane per configuration: a dot per seed, a tick at the mean, the name above."""
    canvas, axes = figure.panel(LANE * len(rows) + 60)
    for place, row in enumerate(rows):
        values = [main.factor * by_prefix[-1] for by_prefix in row[main.key]]
        axes.axhline(place, color=figure.GRID, linewidth=0.8)
        axes.scatter(
            values, [place] * len(values), s=34, color=figure.series(numbers[place]), alpha=0.8, linewidths=0, zorder=3
        )
        mean = spread(values)[0]
        axes.plot([mean, mean], [place - 0.2, place + 0.2], color=figure.INK, linewidth=1.6, zorder=4)
        label = row["label"] if len(row["label"]) <= 52 else row["label"][:51] + "…"
        axes.annotate(
            label,
            (0, place - 0.26),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            color=figure.INK,
            fontsize=11.5,
        )
    axes.set_ylim(len(rows) - 0.5, -0.85)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.05)
    found = [main.factor * by_prefix[-1] for row in rows for by_prefix in row[main.key]]
    if max(found) - min(found) < 10.0**-main.digits:  # differences that are not shown are not to be drawn
        axes.set_xlim(found[0] - 0.5, found[0] + 0.5)
    axes.set_xlabel(main.title)
    svg = figure.to_svg(canvas, name, f"{main.name} of every seed, by configuration")
    note = "Dots: seeds; tick: their mean. The axis does not start at zero."
    return Plot("Every seed", svg, note + (" Lower is better." if main.lower else ""))


def _curves(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], name: str, what: Measure) -> Plot | None:
    """Mean over compute of each configuration, with the range of its seeds."""
    means, bands = [], []
    for row in rows:
        seeds = [sorted(curve) for curve in row.get("curves") or [] if len(curve)]
        if not seeds:
            means.append(([], []))
            bands.append(None)
            continue
        # Seeds may have been measured at slightly different points: interpolate where all of them are known.
        low, high = max(curve[0][0] for curve in seeds), min(curve[-1][0] for curve in seeds)
        grid = (
            np.array(sorted({x for x, _ in seeds[0] if low <= x <= high} | {low, high})) if low <= high else np.empty(0)
        )
        stack = np.array([np.interp(grid, *np.array(curve, dtype=float).T) for curve in seeds]) * what.factor
        means.append((grid.tolist(), stack.mean(axis=0).tolist()))
        bands.append((stack.min(axis=0), stack.max(axis=0)) if len(seeds) > 1 else None)
    if not any(xs for xs, _ in means):
        return None
    canvas, axes = figure.panel(300)
    scale = plots.compute_axis(axes, max(max(xs, default=0) for xs, _ in means))
    for number, (xs, ys), band in zip(numbers, means, bands, strict=True):
        if band is not None:
            axes.fill_between(np.asarray(xs) / scale, *band, color=figure.series(number), alpha=0.12, linewidth=0)
        plots.draw(axes, (np.asarray(xs) / scale, ys), figure.series(number), pattern=figure.dash(number), width=1.5)
    if limits := plots.late_range(means, low=not what.lower):
        axes.set_ylim(*limits)
    svg = figure.to_svg(canvas, name, f"{what.name} over layer evaluations, mean of the seeds")
    title = f"Validation {what.name} over compute{plots.percent(what)}"
    return Plot(title, svg, "Lines: mean of the seeds; shade: their range.")
