"""How much do results depend on the seed, on the initialisation and on the schedule?

Fashion-MNIST, 8 layers of width 64 (a serial stack, or 4 branches of 2), patch 7, the same number of layer evaluations
for every run. At the usual learning rate, and at one so high that a fragile start shows. The papers give single runs.
"""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev, variance
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.study import Cell, Size, Study
from paradepth.studies.tasks import show

SEEDS = (0, 1, 2, 3, 4)
BUDGET = "1.5e5 layer_evals"
BAR = 0.5  # a run whose test accuracy stays below this has failed; chance is 0.1
RATES = {"usual rate": 2e-3, "high rate": 2e-2}
NOTES = {
    "usual rate": "AdamW at 2e-3, the rate of the study of schedules.",
    "high rate": "AdamW at 2e-2, ten times that.",
}
COMMON: dict[str, Any] = {**schedules.COMMON, "warmup": 0.05, "clip": 1.0, "budget": BUDGET, "precision": "bf16"}
COMMON |= {"validations": 3, "width": 64, "heads": 2, "mlp": 256, "dropout": 0.0}
SERIAL = "serial"
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    SERIAL: ("fashion_vit", {"schedule": "joint", "depth": 8}),
    "joint": ("fashion_paraformer", {"schedule": "joint"}),
    "cycle": ("fashion_paraformer", {"schedule": "cycle", "second_pass": True}),
    "one_pass": ("fashion_paraformer", {"schedule": "one_pass"}),
    "stagewise": ("fashion_paraformer", schedules.STAGEWISE),
}
INITIALISATIONS: dict[str, dict[str, Any]] = {
    "default": {"init_weights": "default", "deep_init": False},
    "truncated normal": {"init_weights": "truncated_normal", "deep_init": False},
    "zero output": {"init_weights": "zero_output", "deep_init": False},
    "√(log 2L)": {"init_weights": "default", "deep_init": True},
}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """Of each learning rate: the spread over seeds by initialisation and by schedule, and which runs failed."""
    texts = []
    for group in RATES:
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in records:
            if record["group"] == group:
                rows.setdefault(_row(record["label"]), []).append(record)
        failed = {row: [r for r in found if _failed(r)] for row, found in rows.items()}
        reached = {row: [_accuracy(r) for r in found if not _failed(r)] for row, found in rows.items()}
        count, total = (sum(map(len, part.values())) for part in (failed, rows))
        head = f"{group.capitalize()}: {count} of {total} runs failed (diverged, or stayed below {100 * BAR:g} %)"
        losers = [f"{_label(*row)}: {_reasons(found)}" for row, found in failed.items() if found]
        texts.append(f"{head}{': ' + '; '.join(losers) if losers else ''}.")
        for place, names, what in ((1, INITIALISATIONS, "initialisation"), (0, SCHEDULES, "schedule")):
            shown = [_pooled(name, [v for row, v in reached.items() if row[place] == name]) for name in names]
            texts.append(f"{group.capitalize()}, by {what}, runs that did not fail: {'; '.join(shown)}.")
        spreads = {row: stdev(values) for row, values in reached.items() if len(values) > 1}
        if spreads:
            least, most = (choose(spreads, key=lambda row: spreads[row]) for choose in (min, max))
            texts.append(
                f"{group.capitalize()}: the seeds agree best with {_label(*least)} "
                f"({show('accuracy', reached[least])} %) and least with {_label(*most)} "
                f"({show('accuracy', reached[most])} %)."
            )
    return texts


def _accuracy(record: dict[str, Any]) -> float:
    return record["accuracy"][-1]


def _failed(record: dict[str, Any]) -> bool:
    return "diverged" in record or _accuracy(record) < BAR


def _reasons(found: list[dict[str, Any]]) -> str:
    """Seeds that failed, and how.

    >>> _reasons([{"seed": 1, "diverged": 70}, {"seed": 4, "accuracy": [0.1, 0.2]}])
    'seed 1 diverged at step 70, seed 4 reached 20.00 %'
    """
    how = {
        r["seed"]: f"diverged at step {r['diverged']}"
        if "diverged" in r
        else f"reached {show('accuracy', [_accuracy(r)])} %"
        for r in found
    }
    return ", ".join(f"seed {seed} {text}" for seed, text in how.items())


def _pooled(name: str, rows: list[list[float]]) -> str:
    """Mean of the rows' means, and the deviation over seeds within a row.

    >>> _pooled("joint", [[0.50, 0.52], [0.60, 0.62]])
    'joint 56.00 %, sd 1.41'
    """
    filled = [values for values in rows if values]
    if not filled:
        return f"{name}: every run failed"
    several = [variance(values) for values in filled if len(values) > 1]
    spread = f", sd {100 * sqrt(mean(several)):.2f}" if several else ""
    return f"{name} {100 * mean(map(mean, filled)):.2f} %{spread}"


def _label(schedule: str, initialisation: str) -> str:
    return f"{schedule}, {initialisation}"


def _row(label: str) -> tuple[str, str]:
    schedule, _, initialisation = label.partition(", ")
    return schedule, initialisation


def study(size: Size = "here", *, seeds: tuple[int, ...] = SEEDS) -> Study:
    """Five seeds of every initialisation under every schedule, at two learning rates."""
    cells = []
    for group, rate in RATES.items():
        for schedule, (recipe, shape) in SCHEDULES.items():
            for initialisation, start in INITIALISATIONS.items():
                slug = f"{group} {schedule} {initialisation}".replace("√(log 2L)", "deep").replace(" ", "-")
                options = {**COMMON, **shape, **start, "learning_rate": rate}
                label = _label(schedule, initialisation)
                cells += [Cell(f"{slug}-{seed}", group, label, recipe, options, seed) for seed in seeds]
    return Study(
        name="stability",
        title="Stability over seeds and initialisations",
        question="How much does a result depend on the seed, under which initialisation and schedule, and what fails?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES,
        may_diverge=True,
    )
