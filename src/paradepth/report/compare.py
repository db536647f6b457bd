"""The page that compares several runs on equal axes of compute."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from paradepth.report import figure, plots, text
from paradepth.report.figure import Plot
from paradepth.report.measures import Measure, measure
from paradepth.report.page import notices, render
from paradepth.report.read import Run, number

Deviating = tuple[Sequence[float], Sequence[float], Sequence[float]]  # xs, ys, deviations of the ys
TOLERANCE = 0.02  # relative difference up to which two runs count as equal


def matching(layer_evals: Sequence[float], parameters: Sequence[float]) -> str:
    """Says what differs between runs by more than 2 %, or that nothing does.

    >>> matching([100, 101], [5, 8]), matching([100, 101], [5, 5])
    ('not matched in parameters', 'matched in layer evaluations and parameters')
    """
    compared = {"layer evaluations": layer_evals, "parameters": parameters}
    unequal = [name for name, values in compared.items() if max(values) - min(values) > TOLERANCE * max(values)]
    return f"{'not ' if unequal else ''}matched in {' and '.join(unequal or compared)}"


def comparison_page(runs: Sequence[Run]) -> str:
    """HTML of the comparison of two or more runs."""
    labels = run_labels(runs)
    main = common_measure(runs)
    data = sorted({run.data for run in runs})
    matched = matching([run.layer_evals for run in runs], [run.start["parameters"] for run in runs])
    with figure.style():
        curve = common_curve(runs).key
        curves = [_curves(runs, labels, key) for key in (curve, "loss" if curve == "accuracy" else "accuracy")]
        prefixes = _prefixes(runs, labels, main)
    warnings = []
    if len(data) > 1:
        warnings.append(f"The runs were trained on different data ({', '.join(data)}): their figures do not compare.")
    elif len({run.config.get("model_type") for run in runs}) > 1:
        warnings.append("The runs learned different tasks: their figures do not compare.")
    if len({run.split for run in runs}) > 1:
        warnings.append("Some runs were tested, others only validated: their figures do not compare.")
    warnings += [f"{label}: {notice}" for run, label in zip(runs, labels, strict=True) for notice in notices(run)]
    worth = [main.worth((run.values(main.key) or [math.nan])[-1]) for run in runs]
    ranked = sorted(zip(runs, labels, range(len(runs)), strict=True), key=lambda item: -worth[item[2]])
    widest = max(len(run.values(main.key)) for run in runs)
    fair = len(data) == 1 and len({(run.split, run.config.get("model_type")) for run in runs}) == 1
    rows = [
        _row(run, label, index, widest, main, best=fair and place == 0)
        for place, (run, label, index) in enumerate(ranked)
    ]
    return render(
        "compare.html.j2",
        title=f"{len(runs)} runs on {' and '.join(data)}, {matched}",
        subtitle="Curves share one axis of compute: layer evaluations of training.",
        notices=warnings,
        curves=[plot for plot in curves if plot],
        prefixes=prefixes,
        widest=widest,
        main=main,
        split=f"{runs[0].split} " if len({run.split for run in runs}) == 1 else "",
        rows=rows,
        differences=_differences(runs),
        labels=labels,
        environments=_shared_environment(runs),
        commands=[(label, str(run.environment.get("command", ""))) for run, label in zip(runs, labels, strict=True)],
    )


def common_measure(runs: Sequence[Run]) -> Measure:
    """The measure by which runs are compared: what the first is judged by, if all have it, else the accuracy."""
    wanted = [key for key in runs[0].kind.main if all(run.values(key) for run in runs if run.final)]
    return runs[0].measure(wanted[0] if wanted else "accuracy") if _one_task(runs) else measure("accuracy")


def common_curve(runs: Sequence[Run]) -> Measure:
    """The same for what validations have."""
    keys = {run.curve.key for run in runs if run.validation}
    return runs[0].measure(keys.pop()) if len(keys) == 1 and _one_task(runs) else measure("accuracy")


def _one_task(runs: Sequence[Run]) -> bool:
    return len({run.config.get("model_type") for run in runs}) == 1


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The directories' names, with their parents' where two agree."""
    names = [run.path.resolve().name for run in runs]
    twice = {name for name, uses in Counter(names).items() if uses > 1}
    return [
        "/".join(run.path.resolve().parts[-2:]) if name in twice else name
        for run, name in zip(runs, names, strict=True)
    ]


def _row(run: Run, label: str, index: int, widest: int, main: Measure, *, best: bool) -> dict[str, Any]:
    shown = [main.show(value) for value in run.values(main.key)]
    return {
        "label": label,
        "key": figure.key(label, figure.series(index), figure.dash(index)),
        "model": run.label + (f", {run.schedule}" if run.schedule else ""),
        "best": best and bool(shown),
        "full": shown[-1] if shown else text.MISSING,
        "by_prefix": (shown if run.branches > 1 else []) + [""] * (widest - (len(shown) if run.branches > 1 else 0)),
        "parameters": text.count(run.start["parameters"]),
        "layer_evals": text.count(run.layer_evals),
        "flops": text.count(run.flops, "FLOP"),
        "seconds": text.duration(run.seconds),
    }


def _curves(runs: Sequence[Run], labels: Sequence[str], key: str) -> Plot | None:
    what = runs[0].measure(key) if _one_task(runs) else measure(key)
    lines = []
    for run in runs:
        kept = [event for event in run.validation if event.get(key) and event[key][-1] is not None]
        xs, ys = [number(event, "layer_evals") for event in kept], [what.factor * event[key][-1] for event in kept]
        lines.append((xs, ys))
    if not any(xs for xs, _ in lines):
        return None
    canvas, axes = figure.panel(300)
    scale = plots.compute_axis(axes, max(max(xs, default=0) for xs, _ in lines))
    for index, (xs, ys) in enumerate(lines):
        plots.draw(axes, (np.asarray(xs) / scale, ys), figure.series(index), pattern=figure.dash(index))
    if limits := plots.late_range(lines, low=not what.lower):
        axes.set_ylim(*limits)
    title = f"Validation {what.title}"
    return Plot(title, figure.to_svg(canvas, f"compare-{key}", f"{title} over layer evaluations"), "", legend(labels))


def legend(labels: Sequence[str]) -> list[figure.Key]:
    """Legend of one line per label, in the order of the series colours."""
    return [figure.key(label, figure.series(index), figure.dash(index)) for index, label in enumerate(labels)]


def _prefixes(runs: Sequence[Run], labels: Sequence[str], main: Measure) -> Plot | None:
    found = [run.values(main.key) for run in runs]
    if not any(len(values) > 1 for values in found):
        return None
    lines = []
    for run, values in zip(runs, found, strict=True):
        layers = number(run.start, "layers", float(len(values)))
        used = [layers * (k + 1) / len(values) for k in range(len(values))]
        lines.append((used, [main.factor * value for value in values], [0.0] * len(used)))
    return prefix_plot(lines, legend(labels), range(len(runs)), "compare-prefixes", main)


def prefix_plot(
    lines: Sequence[Deviating], keys: Sequence[figure.Key], numbers: Sequence[int], name: str, what: Measure
) -> Plot:
    """A measure (with its deviation) over layers in use; a line per key, drawn as series `numbers`."""
    canvas, axes = figure.panel(300)
    for index, (xs, ys, deviation) in zip(numbers, lines, strict=True):
        color, alone = figure.series(index), len(xs) == 1
        plots.draw(axes, (xs, ys), color, pattern=figure.dash(index), width=1.5)
        axes.errorbar(
            xs,
            ys,
            yerr=deviation,
            fmt="D" if alone else "o",
            markersize=6.5 if alone else 4.5,
            color=color,
            elinewidth=1,
        )
    axes.set_xlabel("layers used")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.margins(x=0.06, y=0.08)
    alone = any(len(xs) == 1 for xs, _, _ in lines)
    caption = "A point per prefix." + (" Diamonds: networks with a single prefix." if alone else "")
    title = f"{what.name[:1].upper()}{what.name[1:]} by layers in use{plots.percent(what)}"
    return Plot(title, figure.to_svg(canvas, name, f"{what.name} by layers in use"), caption, keys)


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Options whose values are not the same in all runs."""
    # What was built counts more than what was asked for: an option left unset is null in the training options.
    merged = [{**run.training, **run.model} for run in runs]
    names = [name for name in dict.fromkeys(name for options in merged for name in options) if name != "class_names"]
    rows = [
        (name, [text.setting(options[name], name) if name in options else "" for options in merged]) for name in names
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _shared_environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The environment, with every value that occurs."""
    names = dict.fromkeys(name for run in runs for name in run.environment if name not in ("command", "started"))
    values = {name: dict.fromkeys(text.setting(run.environment.get(name)) for run in runs) for name in names}
    return [(name, " | ".join(seen)) for name, seen in values.items()]
