"""The part of a run's page on compression: what the run can be shrunk to, and what it was shrunk from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from paradepth.report import figure as fig
from paradepth.report import text
from paradepth.report.figure import Plot
from paradepth.report.read import Run, read_part

FRONTIER = "compression/frontier.json"  # inside a run
ORIGIN = "compression.json"
_NICE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
_PANEL = (370, 220)  # width and height of the axes, about
_LEAST_SPAN = 4.0  # percentage points that an axis shows, if there are points
_COSTS = {"bytes": "bytes on disk", "latency": "latency at batch 1"}

Point = Mapping[str, Any]


def read_frontier(run: Path) -> Mapping[str, Any] | None:
    """The table of a run that was compressed, its points from the smallest file to the largest, each with its "number";
    None of one that was not.

    Raises:
        ValueError: a damaged file.
    """
    table = read_part(run / FRONTIER, ("points",))
    if table is None:
        return None
    points = sorted(table["points"], key=lambda point: (point["bytes"], -point["accuracy"]))
    return {**table, "points": [{**point, "number": number} for number, point in enumerate(points, start=1)]}


def read_origin(run: Path) -> Mapping[str, Any] | None:
    """What a run was shrunk from; None of an ordinary one.

    Raises:
        ValueError: a damaged file.
    """
    return read_part(run / ORIGIN, ("plan", "from", "limits", "rule", "points"))


def frontier_plots(table: Mapping[str, Any], run: Run) -> list[Plot]:
    """Accuracy against bytes, and against latency where that was measured. Call within `figure.style()`."""
    plots = [_plot(table, run, "bytes")]
    if all(point["latency"] for point in table["points"]):
        plots.append(_plot(table, run, "latency"))
    return plots


def frontier_rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of all points; "best" are those that are not beaten, the chosen one and the full model."""
    full = _full(table["points"])
    chosen = (table.get("chosen") or {}).get("chosen")
    rows = []
    for point in table["points"]:
        tested = point.get("test")
        latency = [f"{row['median_ms']:.2f}" for row in point["latency"] or []] or [text.MISSING] * 2
        remarks = [*(["chosen"] if point["plan"] == chosen else []), *point["leads"]]
        rows.append(
            {
                "number": point["number"],
                "plan": breakable(point["plan"]),
                "accuracy": text.percent(point["accuracy"]),
                "change": _points(point["accuracy"] - full["accuracy"]),
                "test": text.percent(tested["accuracy"]) if tested else text.MISSING,
                "parameters": text.count(point["parameters"]),
                "nonzero": text.count(point["nonzero"]),
                "bytes": text.count(point["bytes"], "B"),
                "smaller": f"{full['bytes'] / point['bytes']:.2f}",
                "flops": text.count(point["flops"], "FLOP"),
                "latency": latency,
                "remark": ", ".join(remarks),
                "best": bool(remarks) or point is full,
            }
        )
    return rows


def frontier_notes(table: Mapping[str, Any], run: Run) -> list[str]:
    """What a reader must know of the figures."""
    samples, full = table["samples"], _full(table["points"])
    said = [f"Accuracies are of {samples:,} validation {run.unit}, by which points are chosen."]
    if run.kind.counted == run.unit and samples:
        error = math.sqrt(full["accuracy"] * (1 - full["accuracy"]) / samples)
        said[0] += f" The standard error of the full model's is {100 * error:.2f} points."
    said.append(
        "Bytes are of the file of weights. Operations count zeros and integers like any other number; only latency "
        "tells what pruning single weights and quantisation do to time."
    )
    machine = table.get("machine")
    if machine and all(point["latency"] for point in table["points"]):
        said.append(
            f"Latency: PyTorch, uncompiled, branches one after another, on {machine['device']} with "
            f"{text.plural(machine['threads'], 'thread')}; medians of calls of all models in turns. Load of the "
            f"machine: {machine['load_average']:.1f} on {text.plural(machine['cpus'] or 1, 'processor')}."
        )
        if table.get("note"):
            said.append(f"Beware: {table['note']}.")
    reasons = dict.fromkeys((table.get("left_out") or {}).values())
    said += [
        f"Left out: {', '.join(plan for plan, why in table['left_out'].items() if why == reason)}: {reason}."
        for reason in reasons
    ]
    return said


def origin_rows(origin: Mapping[str, Any]) -> list[dict[str, str]]:
    """The full model and the shrunk one, side by side."""
    rows = []
    full = origin["points"]["full"]
    for name, point in (("full model", full), (origin["plan"], origin["points"]["chosen"])):
        tested = point.get("test")
        latency = [f"{row['median_ms']:.2f}" for row in point.get("latency") or []] or [text.MISSING] * 2
        rows.append(
            {
                "name": breakable(name),
                "accuracy": text.percent(point["accuracy"]),
                "test": text.percent(tested["accuracy"]) if tested else text.MISSING,
                "parameters": text.count(point["parameters"]),
                "bytes": text.count(point["bytes"], "B"),
                "smaller": f"{full['bytes'] / point['bytes']:.2f}",
                "flops": text.count(point["flops"], "FLOP"),
                "latency": latency,
            }
        )
    return rows


def breakable(plan: str) -> str:
    """A plan that may be broken into lines behind its plus signs."""
    return plan.replace("+", "+\u200b")


# ---- plots ---------------------------------------------------------------------------------------------------


def _plot(table: Mapping[str, Any], run: Run, cost: str) -> Plot:
    points: Sequence[Point] = table["points"]
    leaders = sorted((point for point in points if cost in point["leads"]), key=lambda point: _x(point, cost))
    high = max(_y(point) for point in points)
    low = min(*(_y(point) for point in leaders), max(high - _LEAST_SPAN, min(_y(point) for point in points)))
    pad = 0.09 * max(high - low, 1.0)
    figure, axes = fig.panel(300)
    axes.plot([_x(p, cost) for p in leaders], [_y(p) for p in leaders], color=fig.ACCENT, linewidth=1.2,
              drawstyle="steps-post", alpha=0.7)  # fmt: skip
    below = 0
    for point in points:
        hidden = _y(point) < low - pad
        below += hidden
        lead, y = cost in point["leads"], max(_y(point), low - pad)
        axes.plot([_x(point, cost)], [y], marker="v" if hidden else "o", markersize=6.5 if lead else 4.5, linestyle="",
                  color=fig.ACCENT if lead else fig.MUTED, alpha=1.0 if lead else 0.55)  # fmt: skip
    chosen = (table.get("chosen") or {}).get("chosen")
    for plan, marker in (("full", fig.series(1)), (chosen, fig.series(2))):
        for point in points:
            if point["plan"] == plan:
                axes.plot([_x(point, cost)], [max(_y(point), low - pad)], marker="o", markersize=12, linestyle="",
                          markerfacecolor="none", markeredgecolor=marker, markeredgewidth=1.8)  # fmt: skip
    axes.set_ylim(low - 1.6 * pad, high + 1.8 * pad)
    _logarithmic(axes, [_x(point, cost) for point in points], cost)
    _number(axes, leaders, cost)
    axes.set_xlabel("bytes of the file of weights" if cost == "bytes" else "milliseconds, batch 1, median")
    measure = run.measure("accuracy")
    legend = [fig.key("not beaten", fig.ACCENT), fig.key("beaten", fig.MUTED), fig.key("full model", fig.series(1))]
    if chosen is not None:
        legend.append(fig.key("chosen", fig.series(2)))
    names = Markup(" · ").join(Markup("<b>{}</b>\u202f{}").format(p["number"], breakable(p["plan"])) for p in leaders)
    hidden_note = f" Triangles: points below the axis ({below})." if below else ""
    title = f"Validation {measure.name} against {_COSTS[cost]}, %"
    svg = fig.to_svg(figure, f"frontier-{cost}", title)
    return Plot(title, svg, names + Markup.escape("." + hidden_note), legend)


def _x(point: Point, cost: str) -> float:
    return float(point["bytes"] if cost == "bytes" else point["latency"][0]["median_ms"])


def _y(point: Point) -> float:
    return 100 * point["accuracy"]


def _logarithmic(axes: Axes, xs: Sequence[float], cost: str) -> None:
    """A logarithmic axis with a handful of plain numbers, also where it spans less than a decade."""
    low, high = min(xs) / 1.12, max(xs) * 1.12
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = [base * 10.0**power for power in range(-4, 13) for base in _NICE if low <= base * 10.0**power <= high]
    axes.xaxis.set_major_locator(FixedLocator(steps[:: math.ceil(len(steps) / 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    show = (lambda value, _: _short(value)) if cost == "bytes" else (lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(FuncFormatter(show))


def _short(size: float) -> str:
    """A round size: 150 kB.

    >>> _short(150_000.0), _short(2e6)
    ('150\\u202fkB', '2\\u202fMB')
    """
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return f"{size / scale:g}\u202f{unit}"
    return f"{size:g}\u202fB"


def _number(axes: Axes, leaders: Sequence[Point], cost: str) -> None:
    """The numbers of the leading points, each where it covers no other one, or nowhere."""
    low, high = (math.log(edge) for edge in axes.get_xlim())
    bottom, top = axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for point in leaders:
        x, y = (math.log(_x(point, cost)) - low) / (high - low), (_y(point) - bottom) / (top - bottom)
        for dx, dy in ((0, 12), (0, -12), (-12, 4), (12, -4)):
            place = x + dx / _PANEL[0], y + dy / _PANEL[1]
            if all(abs(place[0] - u) > 15 / _PANEL[0] or abs(place[1] - v) > 12 / _PANEL[1] for u, v in placed):
                axes.annotate(str(point["number"]), (_x(point, cost), _y(point)), xytext=(dx, dy),
                              textcoords="offset points", ha="center", va="center", color=fig.INK,
                              fontsize=11)  # fmt: skip
                placed.append(place)
                break


# ---- files ---------------------------------------------------------------------------------------------------


def _full(points: Sequence[Point]) -> Point:
    return next(point for point in points if point["plan"] == "full")


def _points(difference: float) -> str:
    shown = f"{100 * difference:+.2f}"
    return shown.replace("-", "−") if float(shown) else shown[1:]
