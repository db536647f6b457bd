"""The confusion matrix of an evaluation: checked, then as a table or an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb

from paradepth.report import figure as fig
from paradepth.report import text
from paradepth.report.examples import short
from paradepth.report.figure import Plot

LARGEST_TABLE = 20  # classes; a larger confusion matrix is drawn as an image


def check_confusion(confusion: object, classes: int, path: Path) -> None:
    """Refuses a confusion matrix that is not square, not of numbers, or not of as many classes as there are.

    Raises:
        ValueError: naming the file.
    """
    if not isinstance(confusion, list) or any(
        not isinstance(row, list) or len(row) != len(confusion) for row in confusion
    ):
        raise ValueError(f"{path}: 'confusion' is not a square table")
    for number, row in enumerate(confusion):
        if not all(isinstance(count, int | float) for count in row):
            raise ValueError(f"{path}: row {number} of 'confusion' is {short(row)}, expected a list of numbers")
    if confusion and classes != len(confusion):
        raise ValueError(f"{path}: 'confusion' has {len(confusion)} rows for {classes} classes")


def confusion_table(confusion: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Any]:
    """A confusion matrix for the page: a table, or an image where there are many classes, and the worst confusions."""
    table = np.array(confusion, dtype=float)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    mistakes = [
        (int(table[t, p]), t, p) for t in range(len(names)) for p in range(len(names)) if t != p and table[t, p] > 0
    ]
    mistakes.sort(key=lambda item: (-item[0], item[1:]))
    rows = []
    if len(names) <= LARGEST_TABLE:
        for t, name in enumerate(names):
            cells = [
                {
                    "count": f"{table[t, p]:.0f}",
                    "share": f"{100 * math.sqrt(shares[t, p]):.0f}",
                    "right": t == p,
                    "name": predicted,
                    "percent": text.percent(shares[t, p], 1),
                }
                for p, predicted in enumerate(names)
            ]
            rows.append({"name": name, "cells": cells, "recall": text.percent(shares[t, t], 1)})
    worst = [
        {"true": names[t], "predicted": names[p], "count": n, "share": text.percent(shares[t, p], 1)}
        for n, t, p in mistakes[:8]
    ]
    return {
        "names": names,
        "turned": any(len(name) > 3 for name in names),
        "rows": rows,
        "worst": worst,
        "image": None if rows else _image(shares),
    }


def _image(shares: np.ndarray) -> Plot:
    """Shares of the true class as an image, for tables too large to print: rows are true classes and sum to one."""
    figure, axes = fig.panel(400)
    # Opacity carries the value, so that the same picture works on a light and on a dark page.
    rgba = np.empty((*shares.shape, 4))
    rgba[..., :3] = to_rgb("#4a8fc7")
    rgba[..., 3] = np.sqrt(np.clip(np.nan_to_num(shares), 0, 1))
    axes.imshow(rgba, interpolation="nearest", aspect="equal")
    axes.grid(visible=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    svg = fig.to_svg(figure, "confusion", "Confusion matrix")
    return Plot("Share of each true class", svg, "The stronger the colour, the larger the square root of the share.")
