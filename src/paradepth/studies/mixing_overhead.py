"""What does the input dependence of attention cost, against static mixing of equal parameters?

One layer, forward and backward, timed on one core in turns with its two counterparts, over the number of tokens and the
width. Here 12 sizes × 3 repetitions, each a few seconds besides the start of its process.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.studies.claim import DUAT, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, answer, compare
from paradepth.studies.study import Cell, Size, Study, Sweep

GROUP = "one layer"
CLAIM = Claim(
    "overhead-of-input-dependence",
    "Do parameters that depend on the input, those of attention, cost memory and time against static ones of equal "
    "number?",
    DUAT,
    "question",
)
MEASURES = ("forward_ratio", "step_ratio", "saved_ratio")
_WORDS = {"forward_ratio": "forward pass", "step_ratio": "training step", "saved_ratio": "memory of activations"}

_GRID: dict[Size, dict[str, Any]] = {
    "smoke": {"tokens": (8, 16), "width": (32,), "options": {"batch_tokens": 64, "rounds": 3}},
    "here": {"tokens": (16, 64, 256, 1024), "width": (64, 128, 256), "options": {}},
    # ViT-Tiny to ViT-Base and GPT-2, up to its context and beyond.
    "paper": {"tokens": (64, 197, 1024, 4096), "width": (192, 384, 768), "options": {"batch_tokens": 65536}},
}


def ratios(records: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each row and measure the ratios of attention to static mixing of equal parameters, over the repetitions."""
    rows = by_row(records)[GROUP]
    return {label: {name: last(of, name) for name in MEASURES} for label, of in rows.items()}


def costs(values: list[float]) -> bool:
    """Whether a ratio is above 1 by more than two standard errors over the repetitions.

    >>> costs([1.2, 1.3, 1.25]), costs([1.0, 1.2, 0.9]), costs([0.5, 0.5])
    (True, False, False)
    """
    return compare(values, [1.0] * len(values), lower=True) == Compared.WORSE


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each measure: where attention costs more, and how much at most; and against full matrices."""
    found, texts = ratios(records), []
    for name in MEASURES:
        by_size = {label: row[name] for label, row in found.items()}
        low, high = (choose(by_size, key=lambda label: mean(by_size[label])) for choose in (min, max))
        texts.append(
            f"{_WORDS[name].capitalize()}: attention takes {mean(by_size[low]):.2f} ({low}) to "
            f"{mean(by_size[high]):.2f} ({high}) times what static mixing of equal parameters takes; more, beyond the "
            f"spread of the repetitions, at {_dear(by_size)}."
        )
    full = {r["label"]: r["measures"] for r in records}
    label, told = max(full.items(), key=lambda pair: pair[1]["static_full_parameters"])
    texts.append(
        f"Full matrices, the more of parameters not made up for: at {label} the layer has "
        f"{told['static_full_parameters'] / told['attention_parameters']:.1f} times the parameters of the one with "
        f"attention, and a training step of attention takes {told['full_step_ratio']:.2f} times as long."
    )
    return texts


def _dear(by_size: dict[str, list[float]]) -> str:
    """At how many sizes attention costs more, and at which: those where it does not are named where they are fewer."""
    some = [label for label, values in by_size.items() if costs(values)]
    others = [label for label in by_size if label not in some]
    if not others:
        return f"all {len(by_size)} sizes"
    named = f"all but {', '.join(others)}" if len(others) < len(some) else ", ".join(some)
    return f"{len(some)} of {len(by_size)} sizes{f' ({named})' if named else ''}"


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Yes where a training step takes more time and more memory at every size, beyond two standard errors over the
    repetitions; no where neither does at any size; with conditions otherwise, the sizes named."""
    found = ratios(records)
    told, held = [], []
    for name in ("step_ratio", "saved_ratio"):
        by_size = {label: row[name] for label, row in found.items()}
        means = [mean(values) for values in by_size.values()]
        held += [costs(values) for values in by_size.values()]
        told.append(f"{_WORDS[name]}: {min(means):.2f} to {max(means):.2f} times, more at {_dear(by_size)}")
    figure = f"Attention against static mixing of equal parameters, one layer: {'; '.join(told)}."
    return {CLAIM.name: Verdict(answer(held), figure)}


def study(size: Size = "here") -> Study:
    """A grid of numbers of tokens and widths, three repetitions of each."""
    grid = _GRID[size]
    cells = []
    for width in grid["width"]:
        for tokens in grid["tokens"]:
            label = f"{tokens} tokens of width {width}"
            options = {"tokens": tokens, "width": width, **grid["options"]}
            cells += [
                Cell(f"t{tokens}-d{width}-{s}", GROUP, label, "mixing_overhead", options, s, command="measure")
                for s in range(2 if size == "smoke" else 3)
            ]
    titles = {
        "step_ratio": "training step, attention / static of equal parameters",
        "saved_ratio": "memory of activations, attention / static of equal parameters",
        "full_step_ratio": "training step, attention / full matrices",
    }
    return Study(
        name="mixing_overhead",
        title="What the input dependence of attention costs",
        question="What do attention's input-dependent parameters cost in memory and time, against static mixing of "
        "equal parameters?",
        cells=tuple(cells),
        findings=findings,
        notes={
            GROUP: "Medians of 15 rounds in turns, float32, one core. Static mixing has full matrices and a wider "
            "feed-forward part while T² for each head are fewer parameters than queries and keys, factorised ones "
            "beyond."
        },
        claims=(CLAIM,),
        protocol="One pre-LN layer with heads of width 32 and a feed-forward part of 4 D, on batches of the same "
        "number of tokens. Attention, static mixing by full T × T matrices, and static mixing with as many parameters "
        "as attention (within half a hidden neuron's) are timed in turns in one process: medians of a forward pass "
        "without gradients and of forward and backward pass. Memory is what the forward pass keeps for the backward "
        "pass. Attention is torch's fused kernel, which keeps no T × T weights.",
        verdicts=verdicts,
        curves={
            GROUP: tuple(
                Sweep(name, "tokens", "tokens", lines=("width",), title=title, log_x=True)
                for name, title in titles.items()
            )
        },
    )
