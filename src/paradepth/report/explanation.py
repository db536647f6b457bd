"""How input-dependent a model is and what its branches do: a part of a run's page, and a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from paradepth.report import figure as fig
from paradepth.report import text
from paradepth.report.figure import Plot
from paradepth.report.read import read_part

FILE = "explanation.json"  # inside a run
_PARTS = (
    ("attention", "attention"),
    ("attention_norm", "norm before attention"),
    ("mlp_norm", "norm before the MLP"),
    ("gates", "gates of the MLP"),
)
_KINDS = {
    "image_classifier": "image classifier",
    "causal_lm": "causal language model",
    "masked_lm": "masked language model",
    "sequence_classifier": "classifier of texts",
    "tagger": "tagger",
}
_NEEDED = ("layers", "branches", "samples", "input_share", "constant_share", "input_prefix_share", "error")

Found = Mapping[str, Any]


def read_explanation(run: Path) -> Found | None:
    """The explanation of a run; None of one that has none.

    Raises:
        ValueError: a damaged file.
    """
    return read_part(run / FILE, _NEEDED)


def write_explanation(found: Found, out: Path) -> Path:
    """Write the page of one explanation.

    Args:
        found: as `paradepth.theory.Explanation.to_dict` makes it.
        out: the HTML file to write, replaced in one step.

    Raises:
        OSError: it cannot be written.
    """
    from paradepth.report.page import render, write_page  # which itself draws explanations

    with fig.style():
        plots = explanation_plots(found)
    return write_page(
        render(
            "explanation.html.j2",
            title=f"What this {_KINDS.get(found['model'], 'model')} computes",
            subtitle=f"{text.plural(len(found['branches']), 'branch')}, "
            f"{text.plural(len(found['layers']), 'layer')}, width {found['width']}, "
            f"{text.plural(found['samples'], 'sample')} of up to {text.plural(found['tokens'], 'token')}.",
            notices=[],
            plots=plots,
            rows=explanation_rows(found),
            notes=explanation_notes(found),
        ),
        out,
    )


def explanation_plots(found: Found) -> list[Plot]:
    """Variation of every layer's operators, of the branches' operators, their spectra, and shares of the logits. Call
    within `figure.style()`."""
    plots = [_layers(found), _spectra(found)]
    return [*plots, _variations(found), _shares(found)] if len(found["branches"]) > 1 else plots


def explanation_rows(found: Found) -> list[dict[str, str]]:
    """The table by branch."""
    rows = []
    for branch in found["branches"]:
        layers = [layer for layer in found["layers"] if layer["branch"] == branch["branch"]]
        rows.append(
            {
                "branch": str(branch["branch"]),
                "variation": text.decimal(branch["variation"], 2),
                "rank": text.decimal(branch["effective_rank"], 1),
                "largest": text.decimal(branch["spectrum"][0], 2),
                "attention": _range([layer["attention"] for layer in layers]),
                "gates": _range([layer["gates"] for layer in layers]),
                "active": text.percent(sum(layer["active"] for layer in layers) / len(layers), 0),
                "share": _percent(branch["share"]),
                "prefix_share": _percent(branch["prefix_share"]),
            }
        )
    return rows


def explanation_notes(found: Found) -> list[str]:
    """What the figures mean."""
    serial = found["aggregate"] == "serial"
    notes = [
        f"Over {text.plural(found['samples'], 'sample')}. Variation: √(E‖O − E O‖² / E‖O‖²) of an operator O over "
        "them; 0 for one that is the same for all, near 1 for one that has nothing in common from sample to sample.",
        f"The operator of {'the stack' if serial else 'a branch'} is L(x) − I, where its output is L(x) x + l(x). "
        f"Effective rank: (Σσ²)² / Σσ⁴ of its {found['tokens'] * found['width']:,} singular values.",
        "Active: tokens and units of the MLP with a positive input, of all.",
    ]
    if not serial:
        notes.append(
            "Share of the logits: the part of each branch, the scale of the last norm being frozen; the input makes "
            f"{_percent(found['input_share'])} and the head's constant {_percent(found['constant_share'])}. In order: "
            "what the branch changes in the logits of the prefix before it; the input alone makes "
            f"{_percent(found['input_prefix_share'])}. Both add up to 100\u202f%."
        )
    notes.append(
        "The closed form Σ α σ(W(x) x + θ(x)) and the model differ by "
        f"{found['error']:.1e} of the largest logit, in double precision."
    )
    return notes


# ---- plots ---------------------------------------------------------------------------------------------------


def _layers(found: Found) -> Plot:
    figure, axes = fig.panel(300)
    names = [f"{layer['branch']}.{layer['layer']}" for layer in found["layers"]]
    serial = found["aggregate"] == "serial"
    for index, (key, _) in enumerate(_PARTS):
        ys, start = [layer[key] for layer in found["layers"]], 0
        for branch in found["branches"]:  # a line ends where the branch does
            stop = start + branch["depth"]
            axes.plot(range(start, stop), ys[start:stop], color=fig.series(index), marker="o", markersize=5)
            start = stop
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.5, len(names) - 0.5)
    step = -(-len(names) // 12)
    shown = [str(number + 1) for number in range(len(names))] if serial else names
    axes.set_xticks(range(0, len(names), step), shown[::step])
    axes.set_xlabel("layer" if serial else "branch.layer")
    legend = [fig.key(name, fig.series(index)) for index, (_, name) in enumerate(_PARTS)]
    title = "How much each layer's operators vary from input to input"
    return Plot(title, fig.to_svg(figure, "explain-layers", title), "", legend)


def _spectra(found: Found) -> Plot:
    figure, axes = fig.panel(300)
    branches = found["branches"]
    for index, branch in enumerate(branches):
        values = [value for value in branch["spectrum"] if value > 0]
        axes.plot(range(1, len(values) + 1), values, color=fig.ramp(index, len(branches)), marker="o", markersize=4)
    fig.log_y(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("singular value, from the largest")
    title = "Spectrum of L(x) − I"
    return Plot(title, fig.to_svg(figure, "explain-spectrum", title), "Means over samples.", _legend(branches))


def _variations(found: Found) -> Plot:
    branches = found["branches"]
    figure, axes = fig.panel()
    colors = [fig.ramp(index, len(branches)) for index in range(len(branches))]
    _bars(axes, [[branch["variation"] for branch in branches]], colors)
    axes.set_ylim(0, 1.02)
    _branch_axis(axes, [str(branch["branch"]) for branch in branches])
    title = "How much each branch's operator varies from input to input"
    return Plot(title, fig.to_svg(figure, "explain-variation", title))


def _shares(found: Found) -> Plot:
    branches = found["branches"]
    figure, axes = fig.panel()
    rows = [
        [100 * value for value in (found["input_share"], *(branch["share"] for branch in branches))],
        [100 * value for value in (found["input_prefix_share"], *(branch["prefix_share"] for branch in branches))],
    ]
    _bars(axes, rows, [fig.series(0), fig.series(1)])
    axes.axhline(0, color=fig.MUTED, linewidth=0.9)
    _branch_axis(axes, ["input", *(str(branch["branch"]) for branch in branches)])
    legend = [fig.key("last norm frozen", fig.series(0)), fig.key("in order of the prefixes", fig.series(1))]
    title = "Share of the final logits, %"
    note = "A part below zero works against the rest."
    return Plot(title, fig.to_svg(figure, "explain-shares", title), note, legend)


def _bars(axes: Axes, rows: Sequence[Sequence[float]], colors: Sequence[str]) -> None:
    """Bars of several rows side by side; one row has a colour for each bar, several have one each."""
    width = 0.7 / len(rows)
    for index, row in enumerate(rows):
        places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(row))]
        axes.bar(places, row, width=0.92 * width, color=list(colors) if len(rows) == 1 else colors[index])


def _branch_axis(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // 14)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlabel("branch")


def _legend(branches: Sequence[Found]) -> list[fig.Key]:
    if len(branches) < 2:
        return []
    return [fig.key(f"{i + 1}" if i else "branch 1", fig.ramp(i, len(branches))) for i in range(len(branches))]


def _percent(value: float) -> str:
    return text.percent(value, 1).replace("-", "−")


def _range(values: Sequence[float]) -> str:
    low, high = (text.decimal(value, 2) for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"
