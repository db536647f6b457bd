"""Does growing branches help against forgetting?

Classes that come task by task, where it is known which task a sample is of and where it is not, and domains that follow
each other. A serial ViT of 8 layers, or branches of 8 layers in all, that are trained on; and a ParaFormer of 2
branches of 2 layers that gets a branch of one layer with every further task, everything older frozen. Every row spends
the same number of layer evaluations on every task. A frozen layer that no gradient passes through counts a third, so
growing rows make other numbers of steps; they also end with other numbers of parameters, which the table says. The
paper claims that branches can be added but shows no such run and gives no sizes: "paper" is ViT-Tiny's width, with
budgets that a GPU needs hours for.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from paradepth.studies.claim import PARAFORMER, Claim, Verdict
from paradepth.studies.record import measured
from paradepth.studies.rules import show
from paradepth.studies.study import Cell, Size, Study

EXPANSION = "expansion-for-continual-learning"
CLAIMS = (
    Claim(
        EXPANSION,
        "A trained ParaFormer can be expanded by new branches, which suits continual learning. (Claimed, not "
        "demonstrated.)",
        PARAFORMER,
    ),
)
PROTOCOL = (
    "Sequences of tasks: classes that come one group after another, with and without knowing the task, and domains. "
    "Every row spends the same number of layer evaluations on every task. Growth with replay is held against a serial "
    "stack that is trained on, and against one with the same memory, seed by seed; a difference counts where it "
    "exceeds its standard deviation over the seeds."
)
SERIAL: dict[str, Any] = {"model": "vit_nano", "depth": 8}
BRANCHES: dict[str, Any] = {"model": "paraformer_nano", "branches": 4, "depth": 2}
GROWING: dict[str, Any] = {"model": "paraformer_nano", "branches": 2, "depth": 2, "new_depth": 1}
FINETUNED, REPLAYED, GROWN = "finetune, serial", "replay, serial", "grow + replay, PF 2×2 + n×1"
JOINT = "joint, serial"
ROWS: dict[str, dict[str, Any]] = {
    FINETUNED: {**SERIAL, "strategy": "finetune"},
    REPLAYED: {**SERIAL, "strategy": "replay"},
    "finetune, PF 4×2": {**BRANCHES, "strategy": "finetune"},
    "grow, PF 2×2 + n×1": {**GROWING, "strategy": "grow"},
    GROWN: {**GROWING, "strategy": "grow_replay"},
    JOINT: {**SERIAL, "strategy": "joint"},
}
COMMON: dict[str, Any] = {
    "width": 64,
    "heads": 2,
    "mlp": 256,
    "embedding": "linear",
    "flip": False,
    "crop_padding": 0,
    "batch_size": 64,
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.1,
    "precision": "bf16",
}
# Scenario, setting, samples that memories keep, and options.
GROUPS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "split CIFAR-100, class-incremental": (
        "split_cifar100",
        "class",
        1000,
        {"patch_size": 8, "budget": "4e4 layer_evals"},
    ),
    "split CIFAR-100, task-incremental": (
        "split_cifar100",
        "task",
        1000,
        {"patch_size": 8, "budget": "4e4 layer_evals"},
    ),
    "split Fashion-MNIST, class-incremental": (
        "split_fashion_mnist",
        "class",
        200,
        {"patch_size": 7, "budget": "8e4 layer_evals"},
    ),
    "split Fashion-MNIST, task-incremental": (
        "split_fashion_mnist",
        "task",
        200,
        {"patch_size": 7, "budget": "8e4 layer_evals"},
    ),
    "Fashion-MNIST, digits, CIFAR-10 in grey": (
        "clothes_digits_photos",
        "domain",
        300,
        {"patch_size": 7, "budget": "1.2e5 layer_evals"},
    ),
}
NOTES = {
    name: f"{options['budget'].split()[0]} layer evaluations a task; memories keep {memory} samples. Accuracy is the "
    "mean over all tasks at the end. Joint training draws evenly from all samples so far: of a small task it sees few."
    for name, (_, _, memory, options) in GROUPS.items()
}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each scenario the accuracies, what is forgotten, and whether growth with replay beats the serial stack."""
    texts = []
    for group in dict.fromkeys(record["group"] for record in records):
        labels = dict.fromkeys(record["label"] for record in records if record["group"] == group)
        rows = {label: _by_seed(records, group, label) for label in labels}
        shown = "; ".join(
            f"{label} {show('accuracy', _values(rows[label], 'accuracy'))} (forgetting "
            f"{show('accuracy', _values(rows[label], 'forgetting'))})"
            for label in rows
        )
        sizes = [mean(record["parameters"] for record in rows[label].values()) for label in (GROWN, FINETUNED)]
        texts.append(
            f"{group[:1].upper()}{group[1:]}: average accuracy in %, {shown}. "
            f"Growth with replay against the fine-tuned serial stack: {_margin(rows[GROWN], rows[FINETUNED])}; against "
            f"the serial stack with replay: {_margin(rows[GROWN], rows[REPLAYED])}. It ends with "
            f"{sizes[0]:,.0f} parameters, the serial stack with {sizes[1]:,.0f}." + _transfer(rows)
        )
    return texts


def _by_seed(records: Sequence[dict[str, Any]], group: str, label: str) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in records if (r["group"], r["label"]) == (group, label)}


def _values(row: dict[int, dict[str, Any]], key: str) -> list[float]:
    return [measured(row[seed], key)[-1] for seed in sorted(row)]


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Growth with replay has to win against the serial stack with the same memory on every sequence; against the one
    without memory only, or on some of them, is a condition."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    won: dict[str, list[str]] = {FINETUNED: [], REPLAYED: []}
    parts = []
    for group in groups:
        grown = _by_seed(records, group, GROWN)
        shown = []
        for label, wins in won.items():
            others = _by_seed(records, group, label)
            if _wins(_differences(grown, others)):
                wins.append(group)
            shown.append(f"{_mean_margin(grown, others):+.2f} against {label}")
        parts.append(f"{group}: {', '.join(shown)}")
    figure = (
        f"Points of accuracy of growth with replay: {'; '.join(parts)}. It wins on {len(won[FINETUNED])} and "
        f"{len(won[REPLAYED])} of {len(groups)} sequences."
    )
    if len(won[REPLAYED]) == len(groups):
        return {EXPANSION: Verdict("holds", figure)}
    return {EXPANSION: Verdict("holds with conditions" if won[FINETUNED] else "does not hold", figure)}


def _mean_margin(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> float:
    return 100 * (mean(_values(ours, "accuracy")) - mean(_values(theirs, "accuracy")))


def _differences(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> list[float]:
    """Points of accuracy, seed by seed, between rows that share their seeds, class orders included."""
    pairs = zip(_values(ours, "accuracy"), _values(theirs, "accuracy"), strict=True)
    return [100 * (a - b) for a, b in pairs]


def _wins(differences: Sequence[float]) -> bool:
    """Whether the mean difference is above zero by more than its deviation, which one seed does not tell.

    >>> _wins([2.0, 3.0, 2.5]), _wins([-1.0, 3.0, 2.5]), _wins([2.0])
    (True, False, False)
    """
    return len(differences) > 1 and mean(differences) > stdev(differences)


def _margin(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    """The difference of two rows, and whether it exceeds its deviation."""
    differences = _differences(ours, theirs)
    margin = f"{mean(differences):+.2f}"
    if len(differences) < 2:
        return f"{margin} points, from one seed"
    if _wins(differences):
        told = "more than its sd, so it wins"
    elif _wins([-difference for difference in differences]):
        told = "more than its sd, so it loses"
    else:
        told = "not more than its sd"
    return f"{margin} ± {stdev(differences):.2f} points, {told}"


def _transfer(rows: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Forward transfer, where models have the outputs of tasks that are still to come."""
    found = {label: _values(row, "forward_transfer") for label, row in rows.items()}
    if any(value is None for values in found.values() for value in values):
        return ""
    shown = "; ".join(f"{label} {show('accuracy', values)}" for label, values in found.items())
    return f" Forward transfer in points: {shown}."


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Six strategies on five sequences of tasks."""
    groups, rows, extra = GROUPS, ROWS, {}
    if size == "smoke":
        groups = {"split digits": ("split_digits", "class", 20, {"patch_size": 4, "budget": "256 layer_evals"})}
        rows = {label: ROWS[label] for label in (FINETUNED, REPLAYED, GROWN)}
        extra = {"width": 8, "mlp": 16, "batch_size": 8, "precision": "float32"}
        seeds = seeds[:1]
    elif size == "paper":
        groups = {
            name: (scenario, setting, memory, {"patch_size": 4, "budget": "4e7 layer_evals"})
            for name, (scenario, setting, memory, _) in GROUPS.items()
        }
        rows = {label: {**row, "model": row["model"].replace("nano", "tiny")} for label, row in ROWS.items()}
        extra = {"width": 192, "heads": 3, "mlp": 768, "batch_size": 128, "learning_rate": 1e-3}
    cells = []
    for group, (scenario, setting, memory, options) in groups.items():
        for label, own in rows.items():
            given = {**COMMON, **options, **extra, "setting": setting, **own}
            if "replay" in own["strategy"]:
                given["memory"] = memory
            row = f"{own['strategy']}-{own['model'].split('_')[0]}".replace("_", "-")
            name = f"{scenario.replace('_', '-')}-{setting}-{row}"
            cells += [Cell(f"{name}-{s}", group, label, scenario, given, s, command="continual") for s in seeds]
    return Study(
        name="continual",
        title="Continual learning: growing branches against forgetting",
        question="At equal compute for every task, does a model that grows a branch with every task, with or without a "
        "small memory, forget less than a serial stack that is trained on?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES if size == "here" else {},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
    )
