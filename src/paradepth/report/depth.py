"""The layer-parallel part of a run's page: what the controller saw and did, and how the layers stiffen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from paradepth.report import figure as fig
from paradepth.report.figure import Plot
from paradepth.report.plots import MAX_POINTS
from paradepth.report.read import Run, number

DIRECTIONS = ("forward", "backward")
_SMALLEST = 1e-8  # ρ of an exact solve is 0, which a logarithmic axis cannot show


def depth_plots(run: Run) -> list[Plot]:
    """The plots there is data for, none for an ordinary serial run."""
    return [plot for plot in (_rho(run), _iterations(run), _gradient(run), _lipschitz(run)) if plot is not None]


def depth_rows(run: Run) -> list[dict[str, str]]:
    """The probes after which something changed, for a table."""
    rows = []
    for probe in run.probes:
        for name in DIRECTIONS:
            found = probe.get(name)
            if isinstance(found, Mapping) and found.get("change"):
                rho = found.get("rho")
                rows.append(
                    {
                        "step": f"{number(probe, 'step'):,.0f}",
                        "direction": name,
                        "rho": "not finite" if rho is None else f"{rho:.3g}",
                        "change": str(found["change"]),
                        "iterations": "serial" if found.get("mode") == "serial" else str(found.get("iterations")),
                    }
                )
    return rows


def _color(name: str) -> str:
    return fig.series(DIRECTIONS.index(name))


def _probed(run: Run, name: str) -> list[tuple[float, Mapping[str, Any]]]:
    return [(number(p, "step"), p[name]) for p in run.probes if isinstance(p.get(name), Mapping)]


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: the page does not set formulas."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _rho(run: Run) -> Plot | None:
    lines = {name: [(x, found.get("rho")) for x, found in _probed(run, name)] for name in DIRECTIONS}
    lines = {name: [(x, max(y, _SMALLEST)) for x, y in line if y is not None] for name, line in lines.items()}
    if not any(lines.values()):
        return None
    figure, axes = fig.panel()
    for name, line in lines.items():
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(xs, ys, color=_color(name), marker="o", markersize=3.5, linewidth=1.4)
    threshold = run.training.get("rho_threshold") or 1.0
    axes.axhline(threshold, color=fig.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _logarithmic(axes)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend = [fig.key(name, _color(name)) for name, line in lines.items() if line]
    svg = fig.to_svg(figure, "depth-rho", "Convergence factor of the probes over the steps of training")
    note = "Ratio of the last two residuals of a batch solved with twice the iterations. Above the dashed line the "
    return Plot("Convergence factor ρ", svg, note + "iteration no longer contracts.", legend)


def _iterations(run: Run) -> Plot | None:
    if not any("forward_iterations" in event for event in run.train):
        return None
    figure, axes = fig.panel()
    top = 1
    for index, name in enumerate(DIRECTIONS):
        points = [(number(e, "step"), e.get(f"{name}_iterations")) for e in run.train]
        xs = [x for x, _ in points]
        ys = [math.nan if y is None else float(y) + 0.04 * (1 - 2 * index) for _, y in points]
        axes.plot(xs, ys, color=_color(name), drawstyle="steps-post", linewidth=2)
        serial = [x for x, y in points if y is None]
        axes.plot(serial, [-1 + 0.04 * (1 - 2 * index)] * len(serial), color=_color(name), marker="s", markersize=3,
                  linestyle="")  # fmt: skip
        top = max(top, *(int(y) for _, y in points if y is not None), 1)
    axes.set_ylim(-1.4, top + 0.6)
    step = max(1, math.ceil(top / 6))
    ticks = list(range(0, top + 1, step))
    axes.set_yticks([-1, *ticks], ["serial", *map(str, ticks)])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend = [fig.key(name, _color(name)) for name in DIRECTIONS]
    svg = fig.to_svg(figure, "depth-iterations", "Iterations of the forward and backward solve over the steps")
    return Plot("Iterations and mode", svg, "Of ordinary batches; a probe takes twice as many.", legend)


def _gradient(run: Run) -> Plot | None:
    points = [
        (number(p, "step"), p["cosine"], p.get("relative_norm")) for p in run.probes if p.get("cosine") is not None
    ]
    if not points:
        return None
    figure, axes = fig.panel()
    angles = [(x, 1.0 - y) for x, y, _ in points]
    norms = [(x, abs(y - 1.0)) for x, _, y in points if y is not None]
    for index, line in enumerate((angles, norms)):
        xs, ys = [x for x, _ in line], [max(y, _SMALLEST) for _, y in line]
        axes.plot(xs, ys, color=fig.series(index), marker="o", markersize=3.5, linewidth=1.4)
    _logarithmic(axes)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend = [fig.key("1 − cosine", fig.series(0)), fig.key("|relative norm − 1|", fig.series(1))]
    svg = fig.to_svg(figure, "depth-gradient", "Distance of the parallel gradient from the serial one over the steps")
    note = f"Both are 0 for an exact gradient; what is below {_SMALLEST:g} is drawn there."
    return Plot("Gradient against the serial one", svg, note, legend)


def _lipschitz(run: Run) -> Plot | None:
    events: Sequence[Mapping[str, Any]] = [e for e in run.lipschitz if e.get("estimates")]
    if not events:
        return None
    chosen = events if len(events) <= 8 else [events[round(i * (len(events) - 1) / 7)] for i in range(8)]
    figure, axes = fig.panel()
    for index, event in enumerate(chosen):
        values = [math.nan if v is None else max(float(v), _SMALLEST) for v in event["estimates"][:MAX_POINTS]]
        axes.plot(range(1, len(values) + 1), values, color=fig.ramp(index, len(chosen)), linewidth=1.6)
    _logarithmic(axes)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    legend = [
        fig.key(f"step {number(event, 'step'):,.0f}", fig.ramp(index, len(chosen)))
        for index, event in enumerate(chosen)
        if index in (0, len(chosen) // 2, len(chosen) - 1)
    ]
    svg = fig.to_svg(figure, "depth-lipschitz", "Lipschitz estimate of each layer over training")
    note = "‖h ∂F/∂x‖₂ on a few validation samples, by power iteration. Where it grows, the iteration converges slower."
    return Plot("Lipschitz constant by layer", svg, note, legend)
