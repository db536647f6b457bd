"""Which schedule and which shape is best at equal compute?

Fashion-MNIST, width 64, patch 7; every model has 8 layers except the serial stack of depth 2. All cells of a group
spend the same number of layer evaluations: a small budget, one four times larger and, for some of them, one sixteen
times larger, because a small net wins when compute is short. At size "paper" the authors' setting: width 192, 224
pixels, 16 layers, on the three data sets for which they give accuracies, as many layer evaluations as 300 epochs of the
serial stack take.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf
from statistics import mean
from typing import Any

from paradepth.studies.claim import PARAFORMER, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, answer, compare, show
from paradepth.studies.study import Cell, Size, Study

OVER_VIT, JOINT_WORSE, FASTER = "accuracy-over-vit", "joint-is-worse-than-serial", "convergence-speed"
CLAIMS = (
    Claim(OVER_VIT, "A ParaFormer is up to 2.39 points more accurate than a ViT of as many layers.", PARAFORMER),
    Claim(JOINT_WORSE, "Branches that are trained jointly are worse than a serial Transformer.", PARAFORMER),
    Claim(FASTER, "Progressive approximation converges faster than a serial Transformer.", PARAFORMER),
)
PROTOCOL = (
    "Serial stacks and ParaFormers of as many layers and parameters, under every schedule, each group at the same "
    "number of layer evaluations (a layer on a sample, forward and backward), test accuracy of the full model. The "
    "serial stack of depth 2 has fewer parameters and makes more updates for the same compute. A difference counts "
    "where it exceeds two standard errors over the seeds."
)

NOTES = {
    "small": "200,000 layer evaluations: 0.46 epochs of a stack of depth 8 on 54,000 images.",
    "large": "800,000 layer evaluations: 1.85 epochs of a stack of depth 8.",
    "largest": "3,200,000 layer evaluations: 7.4 epochs of a stack of depth 8, 30 of one of depth 2.",
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
DIGITS: dict[str, Any] = {  # what makes a run of images take a moment, on data that are embedded
    "data": "digits",
    "patch_size": 4,
    "width": 8,
    "heads": 2,
    "mlp": 16,
    "flip": False,
    "batch_size": 32,
    "validations": 2,
}
STAGEWISE: dict[str, Any] = {"schedule": "stagewise", "predecessors": "free", "anneal": "run", "new_branch": "zero"}
STAGEWISE |= {"advance_on": "fixed", "prefix_losses": False}
EQUAL = [0.25, 0.5, 0.75]  # where four stages of equal compute end, in parts of the budget

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
LASTING = {
    **{row: ROWS[row] for row in ("serial, depth 8", "serial, depth 2", "PF 4×2 joint", "PF 4×2 stagewise")},
    "PF 4×2 stagewise, stages of equal compute": ("fashion_paraformer", {**STAGEWISE, "advance_at": EQUAL}),
}
BUDGETS = {
    "small": (ROWS, "2e5 layer_evals"),
    "large": (ROWS, "8e5 layer_evals"),
    "largest": (LASTING, "3.2e6 layer_evals"),
}

AUTHORS: dict[str, Any] = {"image_size": 224, "patch_size": 16, "embedding": "linear"}
AUTHORS |= {"pool": "cls", "dropout": 0.1, "attention_dropout": 0.1, "validations": 20}
PAPER_SETS = {"Fashion-MNIST": ("fashion_mnist", 54_000), "CIFAR-10": ("cifar10", 45_000)}
PAPER_SETS["CIFAR-100"] = ("cifar100", 45_000)
PAPER_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "serial, depth 16": ("paraformer_authors_224", {"model": "vit_tiny", "depth": 16, "schedule": "joint"}),
    "serial, depth 2": ("paraformer_authors_224", {"model": "vit_tiny", "depth": 2, "schedule": "joint"}),
    "PF 8×2 joint": ("paraformer_authors_224", {"schedule": "joint"}),
    "PF 8×2 cycle": ("paraformer_authors_224", {"schedule": "cycle", "second_pass": True}),
    "PF 8×2 one_pass": ("paraformer_authors_224", {"schedule": "one_pass"}),
    "PF 8×2 stagewise": ("paraformer_authors_224", STAGEWISE),
    "PF 4×4 stagewise": ("paraformer_authors_224", {**STAGEWISE, "branches": 4, "depth": 4}),
}

Records = list[dict[str, Any]]


def _serial(rows: dict[str, Records]) -> list[str]:
    """Labels of the serial stacks, the deepest first."""
    return sorted((label for label in rows if label.startswith("serial")), key=lambda label: -rows[label][0]["layers"])


def findings(records: Records) -> list[str]:
    """What wins in each group, against the deepest serial stack, and where accuracy rises with every prefix."""
    texts = []
    for group, rows in by_row(records).items():
        final = {label: last(seeds, "accuracy") for label, seeds in rows.items()}
        order = sorted(final, key=lambda label: -mean(final[label]))
        deep = _serial(rows)[0]
        where = f"{group.capitalize()} budget" if group in BUDGETS else group
        texts.append(
            f"{where}, test accuracy of the full model in %: "
            + "; ".join(f"{label} {show('accuracy', final[label])}" for label in order)
            + f". {order[0]} wins; against the serial stack of depth {rows[deep][0]['layers']} it gains "
            + f"{100 * (mean(final[order[0]]) - mean(final[deep])):.2f} points."
        )
        rising, falling = [], []
        for label, seeds in rows.items():
            prefixes = [mean(column) for column in zip(*(record["accuracy"] for record in seeds), strict=True)]
            if len(prefixes) > 1:
                shown = f"{label} ({', '.join(f'{100 * a:.2f}' for a in prefixes)})"
                (rising if all(a < b for a, b in pairwise(prefixes)) else falling).append(shown)
        texts.append(
            f"{where}, mean test accuracy by prefix. "
            f"Rising with every prefix: {'; '.join(rising) or 'none'}. "
            f"Not rising with every prefix: {'; '.join(falling) or 'none'}."
        )
    return texts


def verdicts(records: Records) -> dict[str, Verdict]:
    """A ParaFormer must beat the serial stack of equal depth in every group; that a shallow one beats both is a
    condition. Joint training must be worse in every group. Convergence is the part of the compute after which the
    validation accuracy is what the serial stack ends with; that a shallow one is there sooner is a condition."""
    groups = by_row(records)
    return {
        OVER_VIT: _over_vit(groups),
        JOINT_WORSE: _joint_worse(groups),
        FASTER: _faster(groups),
    }


def _final(rows: dict[str, Records], label: str) -> list[float]:
    return last(rows[label], "accuracy")


def _shown(rows: dict[str, Records], label: str) -> str:
    return f"{label} {show('accuracy', _final(rows, label))} %"


def _best(rows: dict[str, Records]) -> str:
    """The best of the ParaFormers that are trained progressively."""
    progressive = [label for label in rows if label.startswith("PF") and not label.endswith("joint")]
    return max(progressive, key=lambda label: mean(_final(rows, label)))


def _over_vit(groups: dict[str, dict[str, Records]]) -> Verdict:
    results, shallow, parts = [], [], []
    for group, rows in groups.items():
        best, (deep, *others) = _best(rows), _serial(rows)
        result = compare(_final(rows, best), _final(rows, deep))
        results.append(result)
        shallow += [compare(_final(rows, best), _final(rows, other)) for other in others]
        parts.append(f"{group}: {', '.join(_shown(rows, label) for label in (best, deep, *others))}")
    figure = f"{'; '.join(parts)}."
    if any(result != Compared.BETTER for result in results):
        return Verdict("does not hold", figure)
    if any(result == Compared.WORSE for result in shallow):
        return Verdict(
            "holds with conditions",
            f"{figure} At equal compute and parameters it holds; a serial stack as shallow as one branch, which makes "
            "more updates for the same compute, is better still.",
        )
    return Verdict("holds", figure)


def _joint_worse(groups: dict[str, dict[str, Records]]) -> Verdict:
    worse, parts = [], []
    for group, rows in groups.items():
        joint, deep = next(label for label in rows if label.endswith("joint")), _serial(rows)[0]
        worse.append(compare(_final(rows, joint), _final(rows, deep)) == Compared.WORSE)
        parts.append(f"{group}: {_shown(rows, joint)}, {_shown(rows, deep)}")
    return Verdict(answer(worse), f"{'; '.join(parts)}: worse in {sum(worse)} of {len(worse)} groups.")


def _faster(groups: dict[str, dict[str, Records]]) -> Verdict:
    faster, beaten, parts = 0, 0, []
    for group, rows in groups.items():
        best, (deep, *others) = _best(rows), _serial(rows)
        goal = mean(record["curve"][-1][1] for record in rows[deep])
        spent = mean(record["layer_evals"] for record in rows[deep])
        reached = {label: _reaches(rows[label], goal, spent) for label in (best, *others)}
        ours = reached.pop(best)
        faster += ours < 1
        beaten += any(other < ours for other in reached.values())
        shown = ", ".join(f"{label} after {_part(part)}" for label, part in {best: ours, **reached}.items())
        parts.append(f"{group}: {shown}")
    figure = (
        "Part of the compute after which the final validation accuracy of the serial stack of as many layers is there, "
        f"{'; '.join(parts)}."
    )
    if beaten:
        figure += " A serial stack as shallow as one branch is there sooner."
    if faster == len(groups) and not beaten:
        return Verdict("holds", figure)
    return Verdict("holds with conditions" if faster else "does not hold", figure)


def _reaches(records: Records, goal: float, spent: float) -> float:
    """The part of the compute after which every seed has reached an accuracy, infinite if one never does."""
    parts = [next((evals for evals, accuracy in r["curve"] if accuracy >= goal), inf) / spent for r in records]
    return mean(parts)


def _part(part: float) -> str:
    return f"{100 * part:.0f} %" if part < inf else "more than all"


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Serial stacks against ParaFormers under every schedule, at equal compute."""
    groups: dict[str, tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, Any]]]
    if size == "paper":
        groups = {
            name: (PAPER_ROWS, {**AUTHORS, "data": data, "budget": f"{300 * samples * 16} layer_evals"})
            for name, (data, samples) in PAPER_SETS.items()
        }
    else:
        groups = {group: (rows, {**COMMON, "budget": budget}) for group, (rows, budget) in BUDGETS.items()}
    if size == "smoke":
        chosen = ("serial, depth 8", "serial, depth 2", "PF 4×2 joint", "PF 4×2 stagewise")
        groups = {"small": ({row: ROWS[row] for row in chosen}, {**COMMON, **DIGITS, "budget": "4096 layer_evals"})}
        seeds = seeds[:1]
    cells = []
    for group, (rows, given) in groups.items():
        for label, (recipe, options) in rows.items():
            slug = f"{group}-{label}".replace("×", "x").replace(",", "").replace(" ", "-").lower()
            cells += [Cell(f"{slug}-{seed}", group, label, recipe, {**given, **options}, seed) for seed in seeds]
    return Study(
        name="schedules",
        title="Schedules and shapes at equal compute",
        question="Does a ParaFormer beat a serial Transformer at equal compute, and under which schedule and shape?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES if size == "here" else {},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
    )
