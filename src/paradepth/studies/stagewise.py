"""What makes the later branches of stagewise training contribute?

Fashion-MNIST, 4 branches × 2 layers of width 64, patch 7, equal compute for every variant; at size "paper" 8 × 2 of
width 192 on CIFAR-10 at 224 pixels.
"""

from __future__ import annotations

import itertools
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.claim import PARAFORMER, Claim, Verdict
from paradepth.studies.rules import Compared, compare, show
from paradepth.studies.study import Cell, Size, Study

TUNED, CRITERION = "fine-tuning-predecessors", "when-to-add-a-branch"
CLAIMS = (
    Claim(TUNED, "While a new branch learns, the ones before it are to be fine-tuned, not frozen.", PARAFORMER),
    Claim(
        CRITERION,
        "Does it matter when the next branch starts? (The ones before it must have converged sufficiently; no "
        "criterion is given.)",
        PARAFORMER,
        "question",
    ),
)
PROTOCOL = (
    "One stagewise schedule with one thing changed at a time: what predecessors do, how the rate is annealed, when the "
    "next branch starts, with which losses and weights. Equal compute and parameters, accuracy of the full model on "
    "validation data, since the variants are candidates for a default. A difference counts where it exceeds two "
    "standard errors over the seeds."
)

BUDGET = "1.2e6 layer_evals"  # 2.8 epochs of a stack of depth 8 on 54,000 images
COMMON: dict[str, Any] = {**schedules.COMMON, "validations": 16}

SHARES = [0.1, 0.3, 0.6]  # stages of about equal numbers of steps: a step of stage k costs k branches

FREE, FROZEN, LATER = "free, one decay over the run", "frozen", "free, one decay, later stages longer"
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


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Free against frozen predecessors, and equal stages against ones that get longer, full model."""
    free, frozen = (_final(records, label) for label in ("free", FROZEN))
    equal, later = (_final(records, label) for label in (FREE, LATER))
    better, differs = compare(free, frozen), compare(later, equal)
    tuned = Verdict(
        "holds" if better == Compared.BETTER else "does not hold",
        f"Validation accuracy {show('accuracy', free)} % with fine-tuned and {show('accuracy', frozen)} % with frozen "
        f"predecessors: {better.value}.",
    )
    criterion = Verdict(
        "does not hold" if differs == Compared.SAME else "holds",
        f"Validation accuracy {show('accuracy', equal)} % with stages of equal compute, {show('accuracy', later)} % "
        f"with stages of about as many steps each: {differs.value}.",
    )
    return {TUNED: tuned, CRITERION: criterion}


def _final(records: list[dict[str, Any]], label: str) -> list[float]:
    return [record["validation_accuracy"][-1] for record in records if record["label"] == label]


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Stagewise training: variants of predecessors, annealing, losses and the start of a branch."""
    recipe, group = "fashion_paraformer", "1,200,000 layer evaluations"
    given, variants = {**COMMON, "budget": BUDGET}, dict(VARIANTS)
    equal, shares = schedules.EQUAL, SHARES
    if size == "smoke":
        given |= {**schedules.DIGITS, "budget": "4096 layer_evals"}
        variants = {label: VARIANTS[label] for label in ("free", FROZEN, FREE, LATER)}
        group, seeds = "4,096 layer evaluations", seeds[:1]
    elif size == "paper":
        recipe, group = "paraformer_authors_224", "300 epochs of CIFAR-10"
        given = {**schedules.AUTHORS, "budget": f"{300 * 45_000 * 16} layer_evals"}
        equal, shares = [k / 8 for k in range(1, 8)], [k * (k + 1) / 72 for k in range(1, 8)]
    cells = []
    for label, options in variants.items():
        slug = label.replace(",", "").replace(" ", "-")
        chosen = {
            **given,
            "schedule": "stagewise",
            "anneal": "stage",
            "predecessors": "free",
            "new_branch": "zero",
        }
        chosen |= {"prefix_losses": False, "advance_on": "fixed", "advance_at": equal, **options}
        if options.get("advance_at") == SHARES:
            chosen["advance_at"] = shares
        cells += [Cell(f"{slug}-{seed}", group, label, recipe, chosen, seed) for seed in seeds]
    return Study(
        name="stagewise",
        title="What makes the later branches of stagewise training contribute?",
        question="Which predecessors, annealing, losses and start of a new branch let accuracy rise with every prefix?",
        cells=tuple(cells),
        findings=findings,
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
    )
