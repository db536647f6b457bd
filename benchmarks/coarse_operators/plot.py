"""Draws states.svg and gradients.svg beside the results.

python benchmarks/coarse_operators/plot.py benchmarks/coarse_operators/result.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tables import GOOD, cost, iterated, networks, title

Row = dict[str, Any]
STYLE: dict[Any, Any] = {"svg.hashsalt": "paradepth", "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True}
COLOURS = {"sample": "#b5472f", "branch": "#1f6fb4", "half": "#2f8f4e"}
LINES = {"F": "--", "FCF": "-"}
MARKERS = {2: "o", 4: "s", 8: "^"}
FLOOR = 1e-10  # errors below are drawn here
GOOD_ERROR = (2 * (1 - GOOD)) ** 0.5  # of a gradient with that cosine and the exact norm


def states(result: Row, *, coarsening: int) -> Figure:
    """Error of the states against iterations; a row for each step size, a column for each training."""
    rows = [row for row in result["results"] if row["coarsening"] == coarsening]
    sizes, trainings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("h", "training"))
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots(len(sizes), len(trainings), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axis = axes[sizes.index(row["h"])][trainings.index(row["training"])]
        points = [s for s in row["states"] if s["iterations"] != "serial" and s["error"] is not None]
        axis.plot(
            [s["iterations"] for s in points],
            [max(s["error"], FLOOR) for s in points],
            LINES[row["relaxation"]],
            color=COLOURS[row["coarse"]],
            marker=MARKERS[coarsening],
            markersize=4,
            label=f"{row['coarse']}, {row['relaxation']}",
        )
    for (h, training), axis in zip(networks(rows), axes.flat):
        axis.set_yscale("log")
        axis.set_title(title(h, training), fontsize=9)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[-1]:
        axis.set_xlabel("iterations")
    figure.supylabel("largest relative error of the C-points")
    figure.suptitle(f"States, c = {coarsening}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def gradients(result: Row) -> Figure:
    """Error of the gradient against both costs, for the networks trained longest."""
    last = max(row["training"] for row in result["results"])
    rows = [row for row in result["results"] if row["training"] == last]
    sizes = list(dict.fromkeys(row["h"] for row in rows))
    serial = 2 * result["settings"]["layers"]
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(len(sizes), 2, sharey=True, squeeze=False)
    labels = {"evaluations": "layer evaluations, both passes", "chain": "sequential depth, both passes"}
    for h, pair_of_axes in zip(sizes, axes):
        for axis, key in zip(pair_of_axes, labels):
            here = [row for row in rows if row["h"] == h]
            for name in COLOURS:
                _scatter(axis, [row for row in here if row["coarse"] == name], key, serial)
            axis.axvline(serial, color="black", linewidth=0.8, linestyle=":")
            axis.annotate(
                "serial", (serial, 0.995), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
            )
            axis.axhline(GOOD_ERROR, color="black", linewidth=0.8, linestyle=":")
            axis.annotate(
                f"cosine {GOOD}", (0.995, GOOD_ERROR), xycoords=("axes fraction", "data"), va="bottom", ha="right"
            )
            axis.set_yscale("log")
            axis.set_xlabel(labels[key])
            axis.set_title(title(h, last), fontsize=9)
            axis.grid(alpha=0.3)
        pair_of_axes[0].set_ylabel("relative error of the gradient")
    handles = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    used = sorted({row["coarsening"] for row in rows})
    handles += [Line2D([], [], color="grey", marker=MARKERS[c], linestyle="", label=f"c = {c}") for c in used]
    handles.append(Line2D([], [], color="grey", marker="o", linestyle="", label="FCF"))
    handles.append(Line2D([], [], color="grey", marker="o", linestyle="", fillstyle="none", label="F"))
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle("Gradients; lines join what no cheaper setting of the same operator beats")
    return figure


def _scatter(axis: Axes, rows: list[Row], key: str, serial: int) -> None:
    """One operator's settings, and their lower left edge. What is no shorter than serial depth is left out."""
    found: list[tuple[int, float]] = []
    for row in rows:
        for gradient in iterated(row):
            if gradient["error"] is None or cost(gradient, "chain") >= serial:
                continue
            x, y = cost(gradient, key), max(gradient["error"], FLOOR)
            found.append((x, y))
            axis.plot(
                x,
                y,
                color=COLOURS[row["coarse"]],
                marker=MARKERS[row["coarsening"]],
                fillstyle="full" if row["relaxation"] == "FCF" else "none",
                markersize=5,
                alpha=0.6,
            )
    edge: list[tuple[int, float]] = []
    for x, y in sorted(found):
        if not edge or y < edge[-1][1]:
            edge.append((x, y))
    if edge:
        axis.plot(*zip(*edge), color=COLOURS[rows[0]["coarse"]], linewidth=1.2)


def main() -> None:
    path = Path(sys.argv[1])
    result = json.loads(path.read_text())
    coarsenings = [row["coarsening"] for row in result["results"]]
    with mpl.rc_context(STYLE):
        figures = {
            "states": states(result, coarsening=4 if 4 in coarsenings else coarsenings[0]),
            "gradients": gradients(result),
        }
        for name, figure in figures.items():
            figure.savefig(path.with_name(f"{name}.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
