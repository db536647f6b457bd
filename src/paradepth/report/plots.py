"""The plots of one run: progress over compute, figures by prefix, what each branch adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from paradepth.report import figure as fig
from paradepth.report import text
from paradepth.report.figure import Plot
from paradepth.report.measures import Measure
from paradepth.report.read import Run, number

Values = Sequence[float] | np.ndarray
Points = tuple[Values, Values]  # xs, ys
MAX_POINTS = 240  # more than this cannot be told apart in a panel and makes the page heavy


def compute_axis(axes: Axes, largest: float) -> float:
    """Label the x axis as layer evaluations; returns what to divide them by."""
    scale, word = text.axis_scale(largest)
    axes.set_xlabel(f"layer evaluations{', ' + word if word else ''}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(0, max(largest, 1) / scale * 1.01)
    return scale


def thin(xs: Sequence[float], ys: Sequence[float], limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring points until at most `limit` are left; points that are not finite are left out."""
    pairs = np.array(
        [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)], dtype=float
    )
    if not len(pairs):
        return np.empty(0), np.empty(0)
    bins = np.array_split(pairs, min(limit, len(pairs)))
    means = np.array([part.mean(axis=0) for part in bins])
    return means[:, 0], means[:, 1]


def late_range(lines: Sequence[Points], *, low: bool) -> tuple[float, float] | None:
    """Limits of a y axis that show the last four fifths of each line: the first steps would flatten all that follows.

    `low` says that lines start low (accuracy) rather than high (loss).
    """
    values, late = [], []
    for xs, ys in lines:
        end = max(xs, default=0.0)
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                values.append(y)
                if x >= 0.2 * end:
                    late.append(y)
    if not late:
        return None
    bottom, top = (min(late), max(values)) if low else (min(values), max(late))
    pad = 0.06 * (top - bottom) or 0.5
    return bottom - pad, top + pad


def draw(
    axes: Axes, line: Points, color: str, *, pattern: Sequence[float] = (), width: float = 1.8, alpha: float = 1.0
) -> None:
    """One line, a dot when it has one point only."""
    style: Any = (0, tuple(pattern)) if pattern else "-"
    marker = "o" if len(line[0]) == 1 else ""
    axes.plot(*line, color=color, linewidth=width, alpha=alpha, linestyle=style, marker=marker, markersize=5)


def mark_stages(axes: Axes, stages: Sequence[Mapping[str, Any]], scale: float) -> None:
    """A thin line at each stage change with the number of branches from there on; close neighbours share a label."""
    width = axes.get_xlim()[1]
    changes = [(number(stage, "layer_evals") / scale, int(stage["active"])) for stage in stages]
    labels: list[tuple[float, list[int]]] = []
    for x, active in changes:
        if x > 0:
            axes.axvline(x, color=fig.MUTED, linewidth=0.9, linestyle=(0, (1, 3)))
        if labels and x - labels[-1][0] < 0.06 * width:
            labels[-1][1].append(active)
        else:
            labels.append((x, [active]))
    for x, active in labels:
        name = str(active[0]) if len(active) == 1 else f"{active[0]}–{active[-1]}"
        axes.annotate(name, (x, 1), xycoords=("data", "axes fraction"), xytext=(3 if x == 0 else 0, 2),
                      textcoords="offset points", ha="left" if x == 0 else "center", va="bottom",
                      color=fig.MUTED, fontsize=11)  # fmt: skip


STAGE_NOTE = "Dotted lines: a branch starts; the numbers above count the branches in use."


def progress(run: Run) -> list[Plot]:
    """Loss and accuracy over compute, training against validation."""
    plots = []
    for what, factor in (("loss", 1.0), ("accuracy", 100.0)):
        training = thin(*_points(run.train, what, factor))
        validation = _prefix_points(run.validation, what, -1, factor)
        lines: list[Points] = [line for line in (training, validation) if len(line[0])]
        if not lines:
            continue
        figure, axes = fig.panel()
        scale = compute_axis(axes, max(max(xs) for xs, _ in lines))
        draw(axes, (np.asarray(training[0]) / scale, training[1]), fig.MUTED, width=1.2, alpha=0.75)
        draw(axes, (np.asarray(validation[0]) / scale, validation[1]), fig.ACCENT, width=2)
        if limits := late_range(lines, low=what == "accuracy"):
            axes.set_ylim(*limits)
        several = len(run.stages) > 1
        if several:
            mark_stages(axes, run.stages, scale)
        measure = run.measure(what)
        model = "branches in use" if several else "full model"
        legend = [fig.key("training", fig.MUTED), fig.key(f"validation, {model}", fig.ACCENT)]
        caption = STAGE_NOTE if several else ""
        title = measure.capital
        plots.append(
            Plot(title, fig.to_svg(figure, f"progress-{what}", f"{title} over layer evaluations"), caption, legend)
        )
    return plots


def prefix_curves(run: Run) -> list[Plot]:
    """The measure of every prefix over compute, on validation data, and its final values by prefix."""
    curve, main = run.curve, run.main
    count = max((len(event[curve.key]) for event in run.validation if event.get(curve.key)), default=0)
    plots = []
    if count > 1:
        lines = [_prefix_points(run.validation, curve.key, k, curve.factor) for k in range(count)]
        figure, axes = fig.panel(300)
        scale = compute_axis(axes, max(max(xs, default=0) for xs, _ in lines))
        for k, (xs, ys) in enumerate(lines):
            draw(axes, (np.asarray(xs) / scale, ys), fig.ramp(k, count), width=2.2 if k == count - 1 else 1.5)
        if limits := late_range(lines, low=not curve.lower):
            axes.set_ylim(*limits)
        if len(run.stages) > 1:
            mark_stages(axes, run.stages, scale)
        legend = [fig.key(f"{k + 1}" if k else "prefix 1", fig.ramp(k, count)) for k in range(count)]
        svg = fig.to_svg(figure, "prefix-curves", f"Validation {curve.name} of every prefix over layer evaluations")
        note = STAGE_NOTE if len(run.stages) > 1 else ""
        plots.append(Plot(f"Validation {curve.name} by prefix{percent(curve)}", svg, note, legend))
    final = run.values(main.key)
    if len(final) > 1:
        figure, axes = fig.panel(300)
        xs, ys = range(1, len(final) + 1), [main.factor * value for value in final]
        axes.plot(xs, ys, color=fig.MUTED, linewidth=1.2)
        axes.scatter(xs, ys, s=42, color=[fig.ramp(k, len(final)) for k in range(len(final))], zorder=3)
        label_points(axes, xs, ys, [f"{y:.{main.digits}f}" for y in ys])
        axes.set_xlabel("branches used")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.set_xlim(0.5, len(final) + 0.5)
        svg = fig.to_svg(figure, "prefix-final", f"{run.split} {main.name} by prefix")
        title = f"{run.split.capitalize()} {main.name} by prefix{percent(main)}"
        plots.append(Plot(title, svg, "The vertical axis does not start at zero."))
    return plots


def percent(measure: Measure) -> str:
    """The unit of a measure at the end of a title."""
    return ", %" if measure.percent else ""


def label_points(axes: Axes, xs: Sequence[float], ys: Sequence[float], labels: Sequence[str]) -> None:
    """Write labels over points (under them in a valley of the line); with more than eight points some are left out."""
    finite = [y for y in ys if math.isfinite(y)]
    span = (max(finite) - min(finite)) if finite else 0.0
    span = span or 0.2
    if finite:
        axes.set_ylim(min(finite) - 0.22 * span, max(finite) + 0.2 * span)
    for index, (x, y, label) in enumerate(zip(xs, ys, labels, strict=True)):
        if math.isfinite(y) and (len(labels) <= 8 or (len(labels) - 1 - index) % math.ceil(len(labels) / 8) == 0):
            valley = all(other > y for other in (*ys[max(index - 1, 0) : index], *ys[index + 1 : index + 2]))
            axes.annotate(label, (x, y), xytext=(0, -8 if valley else 7), textcoords="offset points", ha="center",
                          va="top" if valley else "bottom", color=fig.INK, fontsize=11)  # fmt: skip


def branches(run: Run) -> list[Plot]:
    """Contribution of each branch over training, and what each adds in the end."""
    plots, count, main = [], run.branches, run.main
    lines = [_prefix_points(run.validation, "contribution", k, 1.0) for k in range(count)]
    if any(xs for xs, _ in lines):
        figure, axes = fig.panel()
        scale = compute_axis(axes, max(max(xs, default=0) for xs, _ in lines))
        for k, (xs, ys) in enumerate(lines):
            draw(axes, (np.asarray(xs) / scale, ys), fig.ramp(k, count))
        axes.set_ylim(bottom=0)
        if len(run.stages) > 1:
            mark_stages(axes, run.stages, scale)
        legend = [fig.key(f"{k + 1}" if k else "branch 1", fig.ramp(k, count)) for k in range(count)]
        svg = fig.to_svg(figure, "contribution", "Contribution norm of each branch over layer evaluations")
        note = "Mean norm of a branch's contribution, relative to the norm of the embedded input."
        plots.append(Plot("Contribution norm, ‖δᵢ‖ / ‖x‖", svg, note, legend))
    final = run.values(main.key)
    if len(final) > 1:
        gains = [main.factor * (after - before) for before, after in pairwise(final)]
        figure, axes = fig.panel()
        xs = range(2, len(final) + 1)
        axes.bar(xs, gains, width=0.56, color=[fig.ramp(k, len(final)) for k in range(1, len(final))])
        axes.axhline(0, color=fig.MUTED, linewidth=0.9)
        finite = [gain for gain in gains if math.isfinite(gain)] or [0.0]
        low, high = min(0.0, *finite), max(0.0, *finite)
        pad = 0.16 * max(high - low, 5 * 10.0**-main.digits)
        axes.set_ylim(low - (pad if low < 0 else 0), high + (pad if high > 0 else 0.3 * pad))
        for x, gain in zip(xs, gains, strict=True):
            if math.isfinite(gain) and len(gains) <= 10:
                axes.annotate(main.difference(gain / main.factor), (x, gain), xytext=(0, 4 if gain >= 0 else -4),
                              textcoords="offset points", ha="center", va="bottom" if gain >= 0 else "top",
                              color=fig.INK, fontsize=11)  # fmt: skip
        axes.set_xlabel("branch")
        axes.set_xlim(1.4, len(final) + 0.6)
        axes.set_xticks(xs[:: -(-len(xs) // 12)])
        svg = fig.to_svg(figure, "gain", f"Change in {main.name} by each branch after the first")
        note = f"Branch 1 alone reaches {main.show(final[0])} ({run.split}); each bar is what one more branch adds"
        note += ": lower is better." if main.lower else "."
        unit = "percentage points" if main.percent else main.name
        plots.append(Plot(f"Marginal {'change' if main.lower else 'gain'}, {unit}", svg, note))
    return plots


def _points(events: Sequence[Mapping[str, Any]], key: str, factor: float) -> tuple[list[float], list[float]]:
    return [number(event, "layer_evals") for event in events], [factor * number(event, key) for event in events]


def _prefix_points(
    events: Sequence[Mapping[str, Any]], key: str, k: int, factor: float
) -> tuple[list[float], list[float]]:
    """The k-th entry of a list by prefix or branch, from when that branch is in use; k = −1: the full model."""
    xs, ys = [], []
    for event in events:
        values = event.get(key) or []
        if k < len(values) and k < (event.get("active") or len(values)) and values and values[k] is not None:
            xs.append(number(event, "layer_evals"))
            ys.append(factor * float(values[k]))
    return xs, ys
