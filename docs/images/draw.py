"""Draws the pictures of the documentation beside this file; the numbers in them are read from the benchmarks.

python docs/images/draw.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from canvas import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PINK, Sheet, write
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from paradepth.report import figure as fig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_RAISED = str.maketrans("-01234", "⁻⁰¹²³⁴")
BRANCHES = (BLUE, ORANGE, GREEN, PINK)

PICTURES: dict[str, tuple[Callable[[], Figure], str]] = {}


def picture(description: str) -> Callable[[Callable[[], Figure]], Callable[[], Figure]]:
    """Decorator: a picture with the name of its function, and what it shows for those who do not see it."""

    def add(draw: Callable[[], Figure]) -> Callable[[], Figure]:
        PICTURES[draw.__name__.replace("_", "-")] = draw, description
        return draw

    return add


@picture("A layer adds h times F of its input to its input; F is attention and MLP, each behind a norm.")
def layer() -> Figure:
    """A residual step, and what is in F."""
    s = Sheet(122)
    s.text(18, 62, "x", fontsize=14)
    s.arrow((30, 60), (72, 60))
    s.line((50, 60), (50, 18), (368, 18), color=MUTED)
    s.arrow((368, 18), (368, 50), color=MUTED)
    s.box(72, 38, 128, 44, color=BLUE)
    s.text(136, 53, "norm")
    s.text(136, 69, "attention")
    s.arrow((200, 60), (222, 60))
    s.box(222, 38, 92, 44, color=ORANGE)
    s.text(268, 53, "norm")
    s.text(268, 69, "MLP")
    s.arrow((314, 60), (358, 60))
    s.text(336, 50, "h ·", fontsize=12)
    s.plus(368, 60)
    s.arrow((378, 60), (408, 60))
    s.line((72, 96), (72, 101), (314, 101), (314, 96), color=MUTED)
    s.text(193, 114, "F(x)    (the MLP also sees x + attention)", color=MUTED, fontsize=11)
    return s.figure


@picture("A stack has eight layers in a row; branches are four shallow stacks on the same input, added up.")
def stack_and_branches() -> Figure:
    """The same eight layers, in a row and as four branches."""
    s = Sheet(300)
    s.text(6, 16, "stack: 8 layers, each waits for the one before", ha="left", color=MUTED)
    s.text(12, 51, "x", fontsize=14)
    for n in range(8):
        x = 34 + n * 41
        s.arrow((x - 13, 50), (x, 50))
        s.box(x, 34, 28, 32, str(n + 1), color=BRANCHES[n // 2])
    s.arrow((349, 50), (366, 50))
    s.box(366, 34, 48, 32, "head")
    s.text(6, 97, "branches: 4 of 2 layers, none waits for another", ha="left", color=MUTED)
    s.text(12, 205, "x", fontsize=14)
    s.line((24, 204), (48, 204))
    for n, color in enumerate(BRANCHES):
        y = 124 + n * 44
        s.arrow((48, 204), (48, y + 16), (92, y + 16))
        s.box(92, y, 28, 32, str(2 * n + 1), color=color)
        s.arrow((120, y + 16), (133, y + 16))
        s.box(133, y, 28, 32, str(2 * n + 2), color=color)
        s.line((161, y + 16), (290, y + 16))
        s.text(228, y + 8, f"δ{'₁₂₃₄'[n]}(x)", color=color)
        s.line((290, y + 16), (290, 204))
    s.line((48, 140), (48, 112), (310, 112), color=MUTED)
    s.arrow((310, 112), (310, 194), color=MUTED)
    s.arrow((290, 204), (300, 204))
    s.plus(310, 204)
    s.arrow((320, 204), (366, 204))
    s.box(366, 188, 48, 32, "head")
    return s.figure


@picture("States of prefixes 1 to 4 are running sums of the contributions; each goes to the same head.")
def prefixes() -> Figure:
    """Prefix states as running sums."""
    s = Sheet(176)
    s.text(14, 35, "x", fontsize=14)
    s.arrow((26, 34), (70, 34))
    for n, color in enumerate(BRANCHES):
        x = 80 + n * 86
        s.text(x, 9, f"+ δ{'₁₂₃₄'[n]}(x)", color=color)
        s.plus(x, 34)
        if n < 3:
            s.arrow((x + 10, 34), (x + 76, 34))
        s.arrow((x, 44), (x, 98), color=color)
        s.text(x + 8, 72, f"s{'₁₂₃₄'[n]}", ha="left", color=color, fontsize=13)
        s.box(x - 28, 98, 56, 28, "head")
        s.text(x, 140, f"{n + 1} branch{'es' if n else ''}", fontsize=11, color=MUTED)
    s.text(210, 164, "all four come out of one evaluation of the branches", fontsize=12, color=MUTED)
    return s.figure


@picture("Which branches learn when: joint and one_pass all the time, cycle in turns, stagewise one after another.")
def schedules() -> Figure:
    """What is trained when."""
    s = Sheet(318)
    left, right = 46, 412
    width = right - left
    rows = {
        "joint": "one loss, of all four",
        "one_pass": "four losses, of each prefix, from one evaluation",
        "cycle": "for each batch four updates: prefix 1, 2, 3, 4",
        "stagewise": "a branch more in each stage, loss of the newest prefix",
    }
    for r, (name, note) in enumerate(rows.items()):
        top = 8 + r * 76
        s.text(6, top + 4, name, ha="left", fontsize=12.5)
        s.text(92, top + 4, note, ha="left", fontsize=11, color=MUTED)
        for n, color in enumerate(BRANCHES):
            y = top + 17 + n * 11
            s.text(left - 8, y + 4, str(n + 1), fontsize=11, color=color, ha="right")
            s.band([(left, y + 8.5), (right, y + 8.5), (right, y + 8), (left, y + 8)], color=GRID, alpha=1)
            if name == "cycle":
                for batch in range(6):
                    for k in range(n, 4):
                        x = left + width * (4 * batch + k) / 24
                        s.band(
                            [(x + 1, y), (x + width / 24 - 1, y), (x + width / 24 - 1, y + 8), (x + 1, y + 8)],
                            color=color,
                        )
            else:
                start = left + width * {0: 0, 1: 0.1, 2: 0.3, 3: 0.6}[n] if name == "stagewise" else left
                s.band([(start, y), (right, y), (right, y + 8), (start, y + 8)], color=color)
    s.arrow((left, 311), (right, 311), color=MUTED)
    s.text((left + right) / 2, 304, "training", fontsize=11, color=MUTED)
    return s.figure


@picture(
    "Four branches over time: loop one after another, batched as one wide step, threads and processes side by side."
)
def executors() -> Figure:
    """The same branches, evaluated in three ways."""
    s = Sheet(236)
    left = 104

    def lane(y: float, height: float, cuts: list[float], colors: tuple[str, ...], words: tuple[str, ...]) -> None:
        for start, stop, color, word in zip(cuts[:-1], cuts[1:], colors, words, strict=True):
            s.box(left + start, y, stop - start - 3, height, word, color=color, lw=1.1)

    s.text(6, 24, "loop", ha="left")
    lane(12, 22, [0, 76, 152, 228, 304], BRANCHES, ("1", "2", "3", "4"))
    s.text(6, 76, "batched", ha="left")
    for n, color in enumerate(BRANCHES):
        s.box(left, 50 + n * 13, 128, 12, color=color, lw=1.1)
    s.text(left + 142, 70, "one product for all four:", ha="left", fontsize=11, color=MUTED)
    s.text(left + 142, 86, "fewer, wider kernels", ha="left", fontsize=11, color=MUTED)
    s.text(6, 136, "threads, or", ha="left")
    s.text(6, 152, "processes", ha="left")
    lane(118, 22, [0, 88, 176], BRANCHES[::2], ("1", "3"))
    lane(144, 22, [0, 88, 176], BRANCHES[1::2], ("2", "4"))
    s.box(left + 176, 118, 22, 48, "+", color=INK)
    s.text(left + 208, 126, "one sum of", ha="left", fontsize=11, color=MUTED)
    s.text(left + 208, 142, "a state at", ha="left", fontsize=11, color=MUTED)
    s.text(left + 208, 158, "the end", ha="left", fontsize=11, color=MUTED)
    s.arrow((left, 192), (412, 192), color=MUTED)
    s.text((left + 412) / 2, 204, "time", fontsize=11, color=MUTED)
    s.text(210, 226, "the result is the same, up to rounding", fontsize=12, color=MUTED)
    return s.figure


def _row(s: Sheet, y: float, *, count: int = 16, c: int = 4) -> Callable[[int], float]:
    def place(n: int) -> float:
        return 24 + n * 372 / count

    for n in range(count + 1):
        s.dot(place(n), y, color=BLUE if n % c == 0 else MUTED, size=7 if n % c == 0 else 4.5, full=n % c == 0)
    return place


def _hops(
    s: Sheet, y: float, place: Callable[[int], float], hops: list[tuple[int, int]], *, color: str, bend: float
) -> None:
    for a, b in hops:
        s.arrow((place(a) + 3, y - 4), (place(b) - 3, y - 4), color=color, bend=bend, lw=1.2)


@picture("MGRIT with 16 layers and c = 4: a coarse solve, F-relaxation within intervals, C-relaxation, a correction.")
def mgrit() -> Figure:
    """One iteration of MGRIT, step by step."""
    s = Sheet(372)
    inner = [(n, n + 1) for n in range(16) if (n + 1) % 4]
    across = [(n, n + 1) for n in range(16) if not (n + 1) % 4]
    coarse = [(n, n + 4) for n in range(0, 16, 4)]
    steps = (
        ("first guess: coarse steps from C-point to C-point, one after another", coarse, ORANGE, -0.3),
        ("F-relaxation: all intervals at the same time, each from its C-point", inner, GREEN, -0.8),
        ("C-relaxation: the last layer of each interval, all at the same time", across, BLUE, -0.8),
        ("correction: coarse steps again, on what is still wrong at the C-points", coarse, ORANGE, -0.3),
    )
    for k, (words, hops, color, bend) in enumerate(steps):
        top = 6 + k * 76
        s.text(6, top + 6, f"{k + 1}", ha="left", fontsize=13, color=color)
        s.text(20, top + 6, words, ha="left", fontsize=11)
        y = top + 50
        place = _row(s, y)
        _hops(s, y, place, hops, color=color, bend=bend)
    s.dot(30, 324, color=BLUE, size=7)
    s.text(42, 325, "C-point: begins an interval", ha="left", fontsize=11, color=MUTED)
    s.dot(230, 324, color=MUTED, size=4.5, full=False)
    s.text(242, 325, "F-point: all others", ha="left", fontsize=11, color=MUTED)
    s.text(
        20,
        345,
        "An iteration with F is 3, 4, 2. With FCF it is 3, 2, 3, 4, 2. The backward",
        ha="left",
        fontsize=11,
        color=MUTED,
    )
    s.text(20, 361, "pass does the same from the last layer to the first.", ha="left", fontsize=11, color=MUTED)
    return s.figure


@picture("With three levels the C-points of the first level are the points of the second, and so on.")
def levels() -> Figure:
    """Levels, and the points of each."""
    s = Sheet(158)
    rows = ("32 layers", "8 coarse steps of 4 layers", "2 coarse steps of 16, solved one after another")
    for level, words in enumerate(rows):
        y, every = 30 + 54 * level, 4**level
        s.text(6, y + 1, str(level + 1), ha="left", fontsize=13)
        s.text(30, y - 18, words, ha="left", fontsize=11, color=MUTED)
        s.line((30, y), (30 + 32 * 11.9, y), color=GRID)
        for n in range(0, 33, every):
            x, is_c = 30 + n * 11.9, level == 2 or n % (4 * every) == 0
            s.dot(x, y, color=BLUE if is_c else MUTED, size=7 if is_c else 4.5, full=is_c)
            if is_c and level < 2:
                s.arrow((x, y + 5), (x, y + 21), color=BLUE, lw=1.0)
    return s.figure


@picture(
    "A coarse step over four layers: sample takes one four times, branch adds up four on one input, half two and two."
)
def coarse_operators() -> Figure:
    """What stands for an interval of four layers."""
    s = Sheet(252)

    def boxes(y: float, places: list[tuple[float, float, str, str]]) -> None:
        for x, dy, word, color in places:
            s.box(x, y + dy, 40, 18, word, color=color, lw=1.1)

    f = [f"F{'₁₂₃₄'[n]}" for n in range(4)]
    s.text(6, 28, "exact", ha="left")
    boxes(18, [(98 + n * 62, 0, f[n], BRANCHES[n]) for n in range(4)])
    for n in range(4):
        s.arrow((76 + n * 62 if n else 84, 27), (98 + n * 62, 27))
    s.arrow((324, 27), (346, 27))
    s.text(352, 28, "4 in a row", ha="left", fontsize=11, color=MUTED)

    s.text(6, 72, "sample", ha="left")
    boxes(62, [(98, 0, "4 · F₁", BRANCHES[0])])
    s.arrow((84, 71), (98, 71))
    s.arrow((138, 71), (346, 71))
    s.text(352, 72, "1", ha="left", fontsize=11, color=MUTED)

    s.text(6, 131, "branch", ha="left")
    boxes(94, [(98, n * 21, f[n], BRANCHES[n]) for n in range(4)])
    for n in range(4):
        s.arrow((84, 131), (84, 103 + n * 21), (98, 103 + n * 21))
        s.line((138, 103 + n * 21), (158, 103 + n * 21), (158, 131))
    s.arrow((158, 131), (166, 131))
    s.plus(174, 131)
    s.arrow((182, 131), (346, 131))
    s.text(352, 131, "4 at a time", ha="left", fontsize=11, color=MUTED)

    s.text(6, 214, "half", ha="left")
    for part, x in enumerate((98, 222)):
        boxes(194, [(x, 21 * n, f[2 * part + n], BRANCHES[2 * part + n]) for n in range(2)])
        for n in range(2):
            s.arrow((x - 14, 214), (x - 14, 203 + n * 21), (x, 203 + n * 21))
            s.line((x + 40, 203 + n * 21), (x + 54, 203 + n * 21), (x + 54, 214))
        s.arrow((x + 54, 214), (x + 60, 214))
        s.plus(x + 68, 214)
    s.line((174, 214), (208, 214))
    s.arrow((298, 214), (346, 214))
    s.text(352, 207, "2 at a time,", ha="left", fontsize=11, color=MUTED)
    s.text(352, 222, "twice", ha="left", fontsize=11, color=MUTED)
    return s.figure


@picture("Error of the states over iterations: branch sums start closer and fall faster than the sampled layer.")
def iterations() -> Figure:
    """Measured errors of the C-points, from the benchmark of coarse operators."""
    rows = json.loads((ROOT / "benchmarks" / "coarse_operators" / "result.json").read_text())["results"]
    figure = Figure(figsize=(fig.WIDTH / 72, 250 / 72), layout="constrained")
    axes = figure.add_subplot()
    for name, color in zip(("sample", "branch", "half"), BRANCHES, strict=False):
        for relaxation, dashes in (("F", (4, 2)), ("FCF", ())):
            wanted = {"h": "1", "training": 600, "coarsening": 4, "coarse": name, "relaxation": relaxation}
            (row,) = [row for row in rows if all(str(row[key]) == str(value) for key, value in wanted.items())]
            points = [(s["iterations"], s["error"]) for s in row["states"] if isinstance(s["iterations"], int)]
            label = f"{name}, {relaxation}"
            axes.plot(*zip(*points, strict=True), "o-", ms=4, color=color, dashes=dashes or (None, None), label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"10{str(round(math.log10(value))).translate(_RAISED)}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("iterations")
    axes.set_ylabel("relative error of the states")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=11, loc="lower left")
    return figure


@picture(
    "The controller doubles the iterations when ρ is high, goes serial beyond the limit, and comes back when ρ is low."
)
def controller() -> Figure:
    """Iterations that the controller chooses among."""
    s = Sheet(128)
    words = ("1", "2", "4", "serial")
    for n, word in enumerate(words):
        x = 20 + n * 106
        s.box(x, 48, 62, 32, word, color=ORANGE if word == "serial" else BLUE)
        if n < 3:
            s.arrow((x + 64, 56), (x + 104, 56), color=ORANGE)
            s.arrow((x + 104, 72), (x + 64, 72), color=GREEN)
    s.text(210, 18, "ρ at or above the threshold, several probes in a row", fontsize=12, color=ORANGE)
    s.text(210, 36, "→", fontsize=12, color=ORANGE)
    s.text(210, 94, "←", fontsize=12, color=GREEN)
    s.text(210, 112, "ρ low again", fontsize=12, color=GREEN)
    return s.figure


def main() -> None:
    """Draws all pictures."""
    with fig.style():
        for name, (draw, description) in PICTURES.items():
            write(draw(), HERE / f"{name}.svg", description)


if __name__ == "__main__":
    main()
