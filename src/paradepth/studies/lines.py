"""The lines that a study wants drawn, from the records of a group."""

from __future__ import annotations

from typing import Any

from paradepth.studies.record import measured
from paradepth.studies.study import Curve, Sweep


def lines(plot: Curve | Sweep, rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A plot as the report takes it.

    Args:
        plot: what is drawn.
        rows: the records of a group, a list for each row, one record for each seed.

    Returns:
        `measure`, `title`, `x_title`, `log_x`, `log_y` and `lines`: each a `label` and `points`, which are an x value
        and a list of the values of the seeds.

    Raises:
        ValueError: a record lacks the measure, or a curve and its x values do not fit together.

    >>> rows = [[{"name": "a", "label": "A", "options": {}, "measures": {"error": [0.5, 0.25]}}]]
    >>> lines(Curve("error", (1, 2, 4), "branches"), rows)["lines"]
    [{'label': 'A', 'points': [[1, [0.5]], [2, [0.25]]]}]
    """
    return {
        "measure": plot.measure,
        "title": plot.title,
        "x_title": plot.x_title,
        "log_x": plot.log_x,
        "log_y": plot.log_y,
        "lines": _curves(plot, rows) if isinstance(plot, Curve) else _sweeps(plot, rows),
    }


def _curves(plot: Curve, rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        points: dict[float, list[float]] = {}
        for record in row:
            ys = measured(record, plot.measure)
            xs = measured(record, plot.x) if isinstance(plot.x, str) else list(plot.x)
            if len(xs) < len(ys) or (isinstance(plot.x, str) and len(xs) != len(ys)):
                raise ValueError(f"{record['name']}: {plot.measure} has {len(ys)} values for {len(xs)} on the x axis")
            for x, y in zip(xs, ys, strict=False):
                points.setdefault(x, []).append(y)
        found.append({"label": row[0]["label"], "points": [[x, points[x]] for x in sorted(points)]})
    return found


def _sweeps(plot: Sweep, rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        options = row[0]["options"]
        x = options.get(plot.x)
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            continue
        label = ", ".join(_worded(name, options.get(name)) for name in plot.lines)
        points = found.setdefault(label, {}).setdefault(x, [])
        points += [measured(record, plot.measure)[-1] for record in row]
    return [{"label": label, "points": [[x, ys[x]] for x in sorted(ys)]} for label, ys in found.items()]


def _worded(name: str, value: object) -> str:
    """An option in the name of a line.

    >>> _worded("schedule", "joint"), _worded("depth", 2), _worded("causal", True)
    ('joint', 'depth 2', 'causal')
    """
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"not {words}"
    return value if isinstance(value, str) else f"{words} {value}"
