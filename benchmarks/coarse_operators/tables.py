"""The README's tables, made from the results.

python benchmarks/coarse_operators/tables.py benchmarks/coarse_operators/result.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GOOD = 0.99  # cosine of a gradient that points where the exact one does


def number(value: float | None) -> str:
    """Two digits, and "0" for what float64 cannot tell from nothing.

    >>> number(0.1849), number(0.00021), number(3e-16), number(None)
    ('.18', '2e-4', '0', 'diverged')
    """
    if value is None:
        return "diverged"
    if abs(value) < 1e-13:
        return "0"
    text = f"{value:.1f}" if value >= 10 else f"{value:.2g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")
    return text.removeprefix("0") if text.startswith("0.") else text


def cosine(value: float | None) -> str:
    """Three decimals, of which "1.000" means at least .9995."""
    return "diverged" if value is None else f"{value:.3f}".replace("0.", ".", 1)


def markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def networks(rows: list[Row]) -> list[tuple[str, int]]:
    """Step size and training of each network, in order."""
    return list(dict.fromkeys((row["h"], row["training"]) for row in rows))


def title(h: str, training: int) -> str:
    """A network in words."""
    return f"h = {h}, {f'{training} steps' if training else 'untrained'}"


def values(rows: list[Row], key: str) -> list[Any]:
    """The different values of a setting, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def grid(rows: list[Row], cell: Callable[[Row], str]) -> str:
    """One line for each network, coarsening and relaxation, one column for each operator."""
    operators = values(rows, "coarse")
    lines = []
    for h, training in networks(rows):
        for c in values(rows, "coarsening"):
            for relaxation in values(rows, "relaxation"):
                wanted = {"h": h, "training": training, "coarsening": c, "relaxation": relaxation}
                found = {row["coarse"]: row for row in rows if wanted.items() <= row.items()}
                lines.append([title(h, training), c, relaxation, *(cell(found[name]) for name in operators)])
    return markdown(["network", "c", "relaxation", *(f"`{name}`" for name in operators)], lines)


def pair(gradient: Row) -> str:
    """Forward and backward iterations of a gradient."""
    return f"{gradient['forward']}/{gradient['backward']}"


def find(row: Row, forward: Any, backward: Any) -> Row:
    """A method's gradient at these iterations."""
    return next(g for g in row["gradients"] if (g["forward"], g["backward"]) == (forward, backward))


def cost(gradient: Row, key: str) -> int:
    """Evaluations or chain of both passes of a gradient."""
    return gradient["forward_cost"][key] + gradient["backward_cost"][key]


def iterated(row: Row) -> list[Row]:
    """A method's gradients in which neither pass is serial."""
    return [g for g in row["gradients"] if "serial" not in (g["forward"], g["backward"])]


def costs(rows: list[Row]) -> str:
    """What each method costs; it does not depend on the network."""
    first = networks(rows)[0]
    lines = []
    for row in (row for row in rows if (row["h"], row["training"]) == first):
        states = [f"{s['evaluations']}, {s['chain']}" for s in row["states"] if s["iterations"] != "serial"]
        adjoint = {g["backward"]: g["backward_cost"] for g in iterated(row)}
        both = [f"{adjoint[k]['evaluations']}, {adjoint[k]['chain']}" for k in sorted(adjoint)]
        lines.append([row["coarsening"], f"`{row['coarse']}`", row["relaxation"], *states, *both])
    head = ["c", "operator", "relaxation", *(f"forward {k}" for k in range(4)), *(f"backward {k}" for k in range(3))]
    return markdown(head, lines)


def cheapest(rows: list[Row], key: str, *, serial: int) -> str:
    """For each network and operator the lowest cost of a gradient with a cosine of at least `GOOD`.

    Methods with a longer chain than `serial`, that of serial depth, or as long a one, do not count.
    """
    operators = values(rows, "coarse")
    other = "evaluations" if key == "chain" else "chain"
    lines = []
    for h, training in networks(rows):
        line = [title(h, training)]
        for name in operators:
            here = [row for row in rows if (row["h"], row["training"], row["coarse"]) == (h, training, name)]
            good = [(cost(g, key), cost(g, other), g, row) for row in here for g in iterated(row)]
            good = [f for f in good if (f[2]["cosine"] or 0) >= GOOD and cost(f[2], "chain") < serial]
            if not good:
                line.append("none")
                continue
            least, most, g, row = min(good, key=lambda found: found[:2])
            line.append(f"{least} / {most} (c = {row['coarsening']}, {row['relaxation']}, {pair(g)})")
        lines.append(line)
    return markdown(["network", *(f"`{name}`" for name in operators)], lines)


def tables(result: Row) -> str:
    """All tables, with their titles."""
    rows, serial = result["results"], 2 * result["settings"]["layers"]
    pairs = [pair(g) for g in iterated(rows[0])]
    counts = [s["iterations"] for s in rows[0]["states"] if s["iterations"] != "serial"]

    def state_errors(row: Row) -> str:
        return ", ".join(number(s["error"]) for s in row["states"] if s["iterations"] != "serial")

    def cosines(row: Row) -> str:
        return ", ".join(cosine(g["cosine"]) for g in iterated(row))

    def norms(row: Row) -> str:
        return ", ".join(number(g["norm"]) for g in iterated(row))

    def biases(row: Row) -> str:
        return ", ".join(
            f"{cosine(g['cosine'])} ({number(g['norm'])})" for g in (find(row, 1, "serial"), find(row, "serial", 1))
        )

    parts = {
        f"Largest relative error of the C-points after {', '.join(map(str, counts))} iterations": grid(
            rows, state_errors
        ),
        f"Cosine to the exact gradient at forward/backward iterations {', '.join(pairs)}": grid(rows, cosines),
        f"Norm of the gradient over the exact one's at {', '.join(pairs)}": grid(rows, norms),
        "One pass with one iteration, the other serial; forward 1, then backward 1: cosine (norm)": grid(rows, biases),
        "Layer evaluations, sequential depth of each pass": costs(rows),
        f"Least sequential depth / its evaluations, both passes, for a cosine of {GOOD}": cheapest(
            rows, "chain", serial=serial
        ),
        f"Fewest layer evaluations / their sequential depth, both passes, for a cosine of {GOOD}": cheapest(
            rows, "evaluations", serial=serial
        ),
    }
    return "\n\n".join(f"### {name}\n\n{table}" for name, table in parts.items())


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
