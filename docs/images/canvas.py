"""What the pictures of the documentation are drawn with: boxes, arrows and text on a sheet, written as SVG files.

A sheet is 420 units wide and lettering at least 11, so that it can be read on a phone. Colours are those of the reports
(`paradepth.report.figure`): a file follows the reader's light or dark theme.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

from paradepth.report import figure as fig

INK, MUTED, GRID, PAPER = fig.INK, fig.MUTED, fig.GRID, fig.PAPER
BLUE, ORANGE, GREEN, PINK = (fig.series(index) for index in range(4))
WIDTH = fig.WIDTH
_LIGHT = "--ink:#1b1d20;--muted:#5c626a;--grid:#c9ccd1;--paper:#ffffff"
_DARK = "--ink:#e7e8ea;--muted:#aab0b9;--grid:#4a4f59;--paper:#1e2129"


class Sheet:
    """A drawing of `WIDTH` × `height` units; y grows downwards.

    Args:
        height: in units.
    """

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH / 72, height / 72))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, words: str, **how: Any) -> None:
        """Words around (x, y)."""
        self.axes.text(x, y, words, **{"ha": "center", "va": "center_baseline", "fontsize": 12, "color": INK, **how})

    def box(self, x: float, y: float, w: float, h: float, words: str = "", *, color: str = INK, **how: Any) -> None:
        """A rounded box with its upper left corner at (x, y), filled faintly."""
        fill = how.pop("fill", 0.14)
        shape = "round,pad=0,rounding_size=4"
        for part in ({"fc": color, "ec": "none", "alpha": fill}, {"fc": "none", "ec": color, "lw": 1.4, **how}):
            self.axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, **part))
        if words:
            self.text(x + w / 2, y + h / 2, words)

    def line(self, *points: tuple[float, float], color: str = INK, **how: Any) -> None:
        """A line through points."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, **{"color": color, "lw": 1.4, "solid_capstyle": "butt", **how})

    def arrow(self, *points: tuple[float, float], color: str = INK, bend: float = 0.0, **how: Any) -> None:
        """A line through points that ends in a head; between two points it may be bent."""
        if len(points) > 2:
            self.line(*points[:-1], color=color, **how)
        patch = FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>,head_length=4.5,head_width=2.4",
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
            mutation_scale=1,
            **{"lw": 1.4, "color": color, **how},
        )
        self.axes.add_patch(patch)

    def dot(self, x: float, y: float, *, color: str = INK, size: float = 5, full: bool = True) -> None:
        """A point, full or hollow."""
        self.axes.plot([x], [y], "o", ms=size, mec=color, mfc=color if full else PAPER, mew=1.4, zorder=3)

    def plus(self, x: float, y: float) -> None:
        """A sum."""
        self.axes.plot([x], [y], "o", ms=15, mec=INK, mfc=PAPER, mew=1.4, zorder=3)
        self.text(x, y + 0.5, "+", fontsize=14, zorder=4)

    def band(self, points: list[tuple[float, float]], *, color: str, alpha: float = 0.5) -> None:
        """A filled shape without an edge."""
        self.axes.add_patch(Polygon(points, closed=True, fc=color, ec="none", alpha=alpha))


def write(figure: Figure, path: Path, description: str) -> None:
    """Writes a figure as an SVG file of its own: fonts, and the colours of both themes, are in it."""
    svg = fig.to_svg(figure, path.stem, description)
    style = (
        "<style>svg{font-family:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,"
        f"'Liberation Sans','DejaVu Sans',sans-serif}}:root{{{_LIGHT};{fig.theme_variables(dark=False)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_DARK};{fig.theme_variables(dark=True)}}}}}</style>"
    )
    svg = re.sub(r"<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', svg, count=1)
    path.write_text(re.sub(r"(<svg[^>]*>)", lambda match: match[1] + style, svg, count=1).rstrip() + "\n")
