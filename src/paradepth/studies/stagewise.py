"""What makes the later branches of stagewise training contribute?

Fashion-MNIST, 4 branches × 2 layers of width 64, patch 7, equal compute for every variant.
"""

from __future__ import annotations

import itertools
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.study import Cell, Size, Study

BUDGET = "1.2e6 layer_evals"  # 2.8 epochs of a stack of depth 8 on 54,000 images
COMMON: dict[str, Any] = {**schedules.COMMON, "validations": 16}

EQUAL = [0.25, 0.5, 0.75]  # stages of equal compute
SHARES = [0.1, 0.3, 0.6]  # stages of about equal numbers of steps: a step of stage k costs k branches

VARIANTS: dict[str, dict[str, Any]] = {
    "free, one decay over the run": {"anneal": "run"},
    "free": {},
    "slow": {"predecessors": "slow"},
    "frozen": {"predecessors": "frozen"},
    "free, one decay, later stages longer": {"anneal": "run", "advance_at": SHARES},
    "slow, one decay, later stages longer": {"anneal": "run", "advance_at": SHARES, "predecessors": "slow"},
    "frozen, one decay, later stages longer": {"anneal": "run", "advance_at": SHARES, "predecessors": "frozen"},
    "free, one decay, random start": {"anneal": "run", "new_branch": "random"},
    "free, one decay, detached prefix losses": {"anneal": "run", "prefix_losses": True, "detach": True},
    "free, prefix losses": {"prefix_losses": True},
    "slow, prefix losses": {"predecessors": "slow", "prefix_losses": True},
}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """Which variants rise with every prefix, and which ends best, on validation data."""
    rows: dict[str, list[list[float]]] = {}
    for record in records:
        rows.setdefault(record["label"], []).append(record["validation_accuracy"])
    means = {label: [sum(column) / len(column) for column in zip(*seeds, strict=True)] for label, seeds in rows.items()}
    rising = [label for label, m in means.items() if all(a < b for a, b in itertools.pairwise(m))]
    best = max(means, key=lambda label: means[label][-1])
    shown = "; ".join(f"{label}: " + " ".join(f"{100 * a:.2f}" for a in m) for label, m in means.items())
    return [
        f"Validation accuracy by prefix, mean over seeds. {shown}.",
        f"Validation accuracy rises with every prefix for: {', '.join(rising) or 'no variant'}.",
        f"The full model is best with: {best} ({100 * means[best][-1]:.2f} %).",
    ]


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0,)) -> Study:
    """Stagewise training: variants of predecessors, annealing, losses and the start of a branch."""
    cells = []
    for label, options in VARIANTS.items():
        slug = label.replace(",", "").replace(" ", "-")
        for seed in seeds:
            chosen = {
                **COMMON,
                "schedule": "stagewise",
                "anneal": "stage",
                "predecessors": "free",
                "new_branch": "zero",
            }
            chosen |= {"prefix_losses": False, "advance_on": "fixed", "advance_at": EQUAL, "budget": BUDGET, **options}
            cells.append(
                Cell(f"{slug}-{seed}", "1,200,000 layer evaluations", label, "fashion_paraformer", chosen, seed)
            )
    return Study(
        name="stagewise",
        title="What makes the later branches of stagewise training contribute?",
        question="Which predecessors, annealing, losses and start of a new branch let accuracy rise with every prefix?",
        cells=tuple(cells),
        findings=findings,
    )
