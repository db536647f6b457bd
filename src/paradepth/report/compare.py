"""The page that compares several runs on equal axes of compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from paradepth.report import figure, plots, text
from paradepth.report.figure import Plot
from paradepth.report.page import notices, render
from paradepth.report.read import Run, number

Deviating = tuple[Sequence[float], Sequence[float], Sequence[float]]  # xs, ys, deviations of the ys
TOLERANCE = 0.02  # relative difference up to which two runs count as equal


def mismatch(**values: Sequence[float]) -> str:
    """Says which of the named quantities differ by more than 2 %; empty when all agree.

    >>> mismatch(compute=[100, 101], parameters=[5, 8])
    'not matched in parameters'
    """
    unequal = [name for name, series in values.items() if max(series) - min(series) > TOLERANCE * max(series)]
    return f"not matched in {' and '.join(unequal)}" if unequal else ""


def comparison_page(runs: Sequence[Run]) -> str:
    """HTML of the comparison of two or more runs."""
    labels = run_labels(runs)
    data = sorted({run.data for run in runs})
    unequal = mismatch(compute=[run.layer_evals for run in runs], parameters=[run.start["parameters"] for run in runs])
    with figure.style():
        curves = [_curves(runs, labels, "accuracy"), _curves(runs, labels, "loss")]
        prefixes = _prefixes(runs, labels)
    warnings = []
    if len(data) > 1:
        warnings.append(
            f"The runs were trained on different data ({', '.join(data)}): their accuracies do not compare."
        )
    if len({run.split for run in runs}) > 1:
        warnings.append("Some runs were tested, others only validated: their accuracies do not compare.")
    warnings += [f"{label}: {notice}" for run, label in zip(runs, labels, strict=True) for notice in notices(run)]
    ranked = sorted(
        zip(runs, labels, range(len(runs)), strict=True), key=lambda item: -(item[0].accuracy or [-1.0])[-1]
    )
    widest = max(len(run.accuracy) for run in runs)
    fair = len(data) == 1 and len({run.split for run in runs}) == 1
    rows = [
        _row(run, label, index, widest, best=fair and place == 0) for place, (run, label, index) in enumerate(ranked)
    ]
    return render(
        "compare.html.j2",
        title=f"{len(runs)} runs on {' and '.join(data)}"
        + (f", {unequal}" if unequal else ", matched in compute and parameters"),
        subtitle="Curves share one axis of compute: layer evaluations of training.",
        notices=warnings,
        curves=[plot for plot in curves if plot],
        prefixes=prefixes,
        widest=widest,
        split=f"{runs[0].split} " if len({run.split for run in runs}) == 1 else "",
        rows=rows,
        differences=_differences(runs),
        labels=labels,
        environments=_shared_environment(runs),
        commands=[(label, str(run.environment.get("command", ""))) for run, label in zip(runs, labels, strict=True)],
    )


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The directories' names, with their parents' where two agree."""
    names = [run.path.resolve().name for run in runs]
    twice = {name for name, uses in Counter(names).items() if uses > 1}
    return [
        "/".join(run.path.resolve().parts[-2:]) if name in twice else name
        for run, name in zip(runs, names, strict=True)
    ]


def _row(run: Run, label: str, index: int, widest: int, *, best: bool) -> dict[str, Any]:
    accuracy = [text.percent(value) for value in run.accuracy]
    return {
        "label": label,
        "key": figure.key(label, figure.series(index), figure.dash(index)),
        "model": run.label + (f", {run.schedule}" if run.schedule else ""),
        "best": best and bool(run.accuracy),
        "full": accuracy[-1] if accuracy else text.MISSING,
        "by_prefix": (accuracy if run.branches > 1 else [])
        + [""] * (widest - (len(accuracy) if run.branches > 1 else 0)),
        "parameters": text.count(run.start["parameters"]),
        "layer_evals": text.count(run.layer_evals),
        "flops": text.count(run.flops, "FLOP"),
        "seconds": text.duration(run.seconds),
    }


def _curves(runs: Sequence[Run], labels: Sequence[str], what: str) -> Plot | None:
    factor = 100.0 if what == "accuracy" else 1.0
    lines = []
    for run in runs:
        kept = [event for event in run.validation if event[what][-1] is not None]
        lines.append(([number(event, "layer_evals") for event in kept], [factor * event[what][-1] for event in kept]))
    if not any(xs for xs, _ in lines):
        return None
    canvas, axes = figure.panel(300)
    scale = plots.compute_axis(axes, max(max(xs, default=0) for xs, _ in lines))
    for index, (xs, ys) in enumerate(lines):
        plots.draw(axes, (np.asarray(xs) / scale, ys), figure.series(index), pattern=figure.dash(index))
    if limits := plots.late_range(lines, low=what == "accuracy"):
        axes.set_ylim(*limits)
    title = "Validation accuracy, %" if what == "accuracy" else "Validation loss"
    return Plot(title, figure.to_svg(canvas, f"compare-{what}", f"{title} over layer evaluations"), "", legend(labels))


def legend(labels: Sequence[str]) -> list[figure.Key]:
    """Legend of one line per label, in the order of the series colours."""
    return [figure.key(label, figure.series(index), figure.dash(index)) for index, label in enumerate(labels)]


def _prefixes(runs: Sequence[Run], labels: Sequence[str]) -> Plot | None:
    if not any(len(run.accuracy) > 1 for run in runs):
        return None
    lines = []
    for run in runs:
        layers = number(run.start, "layers", float(len(run.accuracy)))
        used = [layers * (k + 1) / len(run.accuracy) for k in range(len(run.accuracy))]
        lines.append((used, [100 * value for value in run.accuracy], [0.0] * len(used)))
    return prefix_plot(lines, legend(labels), range(len(runs)), "compare-prefixes")


def prefix_plot(lines: Sequence[Deviating], keys: Sequence[figure.Key], numbers: Sequence[int], name: str) -> Plot:
    """Accuracy (per cent, with its deviation) over layers in use; a line per key, drawn as series `numbers`."""
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
    return Plot("Accuracy by layers in use, %", figure.to_svg(canvas, name, "Accuracy by layers in use"), caption, keys)


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
