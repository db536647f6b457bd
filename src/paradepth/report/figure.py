"""Matplotlib figures as inline SVG whose colours and fonts the page decides.

Figures are drawn in reserved marker colours; `to_svg` replaces those by CSS variables, so that one drawing is readable
on a light and on a dark page. Text stays text. A panel is 420 units wide: two fit beside each other on a desktop, one
on a phone without its lettering becoming too small.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from paradepth.report.text import significant

WIDTH = 420
INK, MUTED, GRID, PAPER, ACCENT = "#010203", "#010204", "#010205", "#010206", "#010207"
_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", ACCENT: "accent"}

# Okabe and Ito's colour-blind safe set, darkened (lightened) until each has 3:1 contrast with the light (dark) page.
SERIES_LIGHT = ("#0067a8", "#c75000", "#00825f", "#a8558a", "#8a6d00", "#3b3b3b", "#7a3b1d")
SERIES_DARK = ("#5cb3ec", "#f08a3c", "#2fc79c", "#e39ac6", "#e6c229", "#d0d0d0", "#d19a7a")
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
RAMP_STEPS = 16
_RAMP_LIGHT = ((214, 140, 20), (176, 62, 98), (44, 52, 140))
_RAMP_DARK = ((250, 204, 90), (232, 122, 150), (140, 160, 255))

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "paradepth",
    "font.size": 12,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend, which the page sets in HTML so that it wraps: label, CSS colour, dash pattern."""

    label: str
    color: str
    dash: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing with its title, legend and caption."""

    title: str
    svg: Markup
    caption: str = ""
    legend: Sequence[Key] = ()


def series(index: int) -> str:
    """Marker colour of series `index`; seven colours, then again with another `dash`."""
    return f"#0104{index % len(SERIES_LIGHT):02x}"


def dash(index: int) -> tuple[float, ...]:
    """Dash pattern of series `index`: solid for the first seven."""
    return DASHES[index // len(SERIES_LIGHT) % len(DASHES)]


def ramp(index: int, count: int) -> str:
    """Marker colour of element `index` of an ordered set of `count` (prefixes, branches)."""
    return f"#0103{round(index / max(count - 1, 1) * (RAMP_STEPS - 1)) if count > 1 else RAMP_STEPS - 1:02x}"


def css_color(marker: str) -> str:
    """The CSS colour that stands for a marker colour.

    >>> css_color(series(2)), css_color(INK)
    ('var(--s2)', 'var(--ink)')
    """
    if marker in _NAMES:
        return f"var(--{_NAMES[marker]})"
    return f"var(--{'s' if marker[3:5] == '04' else 'p'}{int(marker[5:7], 16)})"


def key(label: str, marker: str, pattern: Sequence[float] = ()) -> Key:
    """Legend entry for a line drawn in a marker colour."""
    return Key(label, css_color(marker), " ".join(f"{part * 1.8:g}" for part in pattern))


def theme_variables(*, dark: bool) -> str:
    """CSS declarations of the series and ramp colours of one theme."""
    stops = _RAMP_DARK if dark else _RAMP_LIGHT
    names = [f"--s{index}:{color}" for index, color in enumerate(SERIES_DARK if dark else SERIES_LIGHT)]
    for step in range(RAMP_STEPS):
        position = step / (RAMP_STEPS - 1) * (len(stops) - 1)
        low = min(int(position), len(stops) - 2)
        rgb = (round(a + (b - a) * (position - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
        names.append(f"--p{step}:#" + "".join(f"{part:02x}" for part in rgb))
    return ";".join(names)


def panel(height: int = 260) -> tuple[Figure, Axes]:
    """A figure of `WIDTH` × `height` units with one axes, outside pyplot's global state. Call within `style()`."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.04))
    return figure, figure.add_subplot()


def log_y(axes: Axes) -> None:
    """A logarithmic y axis with few ticks and plain numbers. Call when everything is drawn: ticks follow the limits."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value)))


def style():
    """Context in which the page's plots are drawn."""
    return matplotlib.rc_context(STYLE)


def to_svg(figure: Figure, name: str, description: str) -> Markup:
    """Inline SVG of a figure: no prolog, metadata or fixed size, ids unique to `name`, an accessible description."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    opening = f'<svg {box[0]} role="img" aria-label="{Markup.escape(description)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"#01(?:020[3-7]|03[0-9a-f]{2}|040[0-7])\b", lambda match: css_color(match[0]), text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    return Markup(re.sub(r"\n\s*", "\n", text))
