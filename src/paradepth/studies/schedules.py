"""Which schedule and which shape is best at equal compute?

Fashion-MNIST, width 64, patch 7; every model has 8 layers except the serial stack of depth 2. All cells of a group
spend the same number of layer evaluations. A small budget and one four times larger, because a small net wins when
compute is short.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from paradepth.studies.study import Cell, Size, Study

BUDGETS = {"small": "2e5 layer_evals", "large": "8e5 layer_evals"}
NOTES = {
    "small": "200,000 layer evaluations: 0.46 epochs of a stack of depth 8 on 54,000 images.",
    "large": "800,000 layer evaluations: 1.85 epochs of a stack of depth 8.",
}
COMMON: dict[str, Any] = {  # whatever a recipe may come to choose otherwise
    "patch_size": 7,
    "embedding": "linear",
    "flip": True,
    "crop_padding": 0,
    "batch_size": 128,
    "optimiser": "adamw",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "validations": 5,
}
STAGEWISE: dict[str, Any] = {"schedule": "stagewise", "predecessors": "free", "anneal": "run", "new_branch": "zero"}
STAGEWISE |= {"advance_on": "fixed", "prefix_losses": False}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "serial, depth 8": ("fashion_vit", {"schedule": "joint", "depth": 8}),
    "serial, depth 2": ("fashion_vit", {"schedule": "joint", "depth": 2}),
    "PF 4×2 joint": ("fashion_paraformer", {"schedule": "joint"}),
    "PF 4×2 cycle": ("fashion_paraformer", {"schedule": "cycle", "second_pass": True}),
    "PF 4×2 one_pass": ("fashion_paraformer", {"schedule": "one_pass"}),
    "PF 4×2 stagewise": ("fashion_paraformer", STAGEWISE),
    "PF 4×2 stagewise, prefix losses": (
        "fashion_paraformer",
        {**STAGEWISE, "prefix_losses": True},
    ),
    "PF 8×1 stagewise": ("fashion_paraformer", {**STAGEWISE, "branches": 8, "depth": 1}),
    "PF 2×4 stagewise": ("fashion_paraformer", {**STAGEWISE, "branches": 2, "depth": 4}),
}


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def findings(records: list[dict[str, Any]]) -> list[str]:
    """What wins in each group, against the serial stack of equal depth, and where accuracy rises with every prefix."""
    texts = []
    for group in BUDGETS:
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if record["group"] == group:
                rows.setdefault(record["label"], []).append(record)
        final = {label: [record["accuracy"][-1] for record in seeds] for label, seeds in rows.items()}
        order = sorted(final, key=lambda label: -mean(final[label]))
        deep = "serial, depth 8"
        texts.append(
            f"{group.capitalize()} budget, test accuracy of the full model in %: "
            + "; ".join(f"{label} {_percent(final[label])}" for label in order)
            + f". {order[0]} wins; against the serial stack of depth 8 it gains "
            + f"{100 * (mean(final[order[0]]) - mean(final[deep])):.2f} points."
        )
        rising, falling = [], []
        for label, seeds in rows.items():
            prefixes = [mean(column) for column in zip(*(record["accuracy"] for record in seeds), strict=True)]
            if len(prefixes) > 1:
                shown = f"{label} ({', '.join(f'{100 * a:.2f}' for a in prefixes)})"
                (rising if all(a < b for a, b in pairwise(prefixes)) else falling).append(shown)
        texts.append(
            f"{group.capitalize()} budget, mean test accuracy by prefix. "
            f"Rising with every prefix: {'; '.join(rising) or 'none'}. "
            f"Not rising with every prefix: {'; '.join(falling) or 'none'}."
        )
    return texts


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Serial stacks against ParaFormers under every schedule, at two budgets of equal compute."""
    cells = []
    for group, budget in BUDGETS.items():
        for label, (recipe, options) in ROWS.items():
            slug = label.replace("×", "x").replace(",", "").replace(" ", "-").lower()
            for seed in seeds:
                cells.append(
                    Cell(f"{group}-{slug}-{seed}", group, label, recipe, {**COMMON, **options, "budget": budget}, seed)
                )
    return Study(
        name="schedules",
        title="Schedules and shapes at equal compute",
        question="Does a ParaFormer beat a serial Transformer at equal compute, and under which schedule and shape?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES,
    )
