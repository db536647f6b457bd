"""How much do results depend on the seed, on the initialisation and on the schedule?

Fashion-MNIST, 8 layers of width 64 (a serial stack, or 4 branches of 2), patch 7, the same number of layer evaluations
for every run. At the usual learning rate, and at one so high that a fragile start shows. The papers give single runs.
At size "paper" the authors' setting on CIFAR-10.
"""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev, variance
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.claim import PARAFORMER, Answer, Claim, Verdict
from paradepth.studies.rules import show
from paradepth.studies.study import Cell, Size, Study

STABLE, INITIALISATION = "stability-over-seeds", "stability-over-initialisations"
CLAIMS = (
    Claim(
        STABLE,
        "Do results of branches depend no more on the seed than those of a serial stack?",
        PARAFORMER,
        "question",
    ),
    Claim(INITIALISATION, "Does training end alike whatever the initialisation?", PARAFORMER, "question"),
)
RATIO = 1.53  # of standard deviations: the square root of the 95 % point of F(16, 16)
ALIKE = 0.01
PROTOCOL = (
    "Every initialisation under every schedule with five seeds, at the usual learning rate and ten times that, equal "
    "compute and parameters. A run has failed if it diverged or stayed below an accuracy of 50 %. The deviation over "
    "the seeds is pooled over the initialisations (16 degrees of freedom), that of branches counts as larger where it "
    "exceeds 1.53 times that of the serial stack. Initialisations end alike where the means of their rows are within "
    "one point of each other."
)
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
    for group in _groups(records):
        rows = _rows(records, group)
        failed = {row: [r for r in found if _failed(r)] for row, found in rows.items()}
        reached = {row: [_accuracy(r) for r in found if not _failed(r)] for row, found in rows.items()}
        count, total = (sum(map(len, part.values())) for part in (failed, rows))
        head = f"{group.capitalize()}: {count} of {total} runs failed (diverged, or stayed below {100 * BAR:g} %)"
        losers = [f"{_label(*row)}: {_reasons(found)}" for row, found in failed.items() if found]
        texts.append(f"{head}{': ' + '; '.join(losers) if losers else ''}.")
        for place, names, what in ((1, INITIALISATIONS, "initialisation"), (0, SCHEDULES, "schedule")):
            values = {name: [v for row, v in reached.items() if row[place] == name] for name in names}
            shown = [_pooled(name, found) for name, found in values.items() if found]
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


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Spread over the seeds and failures of branches against those of the serial stack, and means of initialisations:
    at every rate it holds, at the usual one only it holds with conditions."""
    groups = _groups(records)
    return {STABLE: _over_seeds(records, groups), INITIALISATION: _over_starts(records, groups)}


def _over_seeds(records: list[dict[str, Any]], groups: list[str]) -> Verdict:
    stable, parts = [], []
    for group in groups:
        rows = _rows(records, group)
        names = list(dict.fromkeys(row[0] for row in rows))
        by_schedule = {name: [found for row, found in rows.items() if row[0] == name] for name in names}
        spreads = {
            name: _spread([[_accuracy(r) for r in found if not _failed(r)] for found in of_name])
            for name, of_name in by_schedule.items()
        }
        failed = {name: sum(_failed(r) for found in of_name for r in found) for name, of_name in by_schedule.items()}
        stable.append(
            all(spreads[n] <= RATIO * spreads[SERIAL] and failed[n] <= failed[SERIAL] for n in names if n != SERIAL)
        )
        lost = {name: f" ({count} failed)" if count else "" for name, count in failed.items()}
        shown = [f"{name} {100 * spreads[name]:.2f}{lost[name]}" for name in names]
        parts.append(f"{group}: {', '.join(shown)}")
    return Verdict(_at_which_rates(stable), f"Deviation over the seeds in points of accuracy, {'; '.join(parts)}.")


def _over_starts(records: list[dict[str, Any]], groups: list[str]) -> Verdict:
    alike, parts = [], []
    for group in groups:
        rows = _rows(records, group)
        ranges = {}
        for name in dict.fromkeys(row[0] for row in rows):
            reached = [[_accuracy(r) for r in found if not _failed(r)] for row, found in rows.items() if row[0] == name]
            means = [mean(values) if values else 0.0 for values in reached]
            ranges[name] = max(means) - min(means)
        alike.append(all(value <= ALIKE for value in ranges.values()))
        parts.append(f"{group}: {', '.join(f'{name} {100 * value:.2f}' for name, value in ranges.items())}")
    figure = f"From the worst to the best initialisation, points of accuracy, {'; '.join(parts)}."
    return Verdict(_at_which_rates(alike), f"{figure} (An initialisation all of whose runs failed counts as 0 %.)")


def _at_which_rates(held: list[bool]) -> Answer:
    return "holds" if all(held) else "holds with conditions" if held[0] else "does not hold"


def _groups(records: list[dict[str, Any]]) -> list[str]:
    """The usual rate first."""
    return list(dict.fromkeys(record["group"] for record in records))


def _rows(records: list[dict[str, Any]], group: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By schedule and initialisation."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["group"] == group:
            rows.setdefault(_row(record["label"]), []).append(record)
    return rows


def _spread(rows: list[list[float]]) -> float:
    """The deviation over seeds within a row."""
    several = [variance(values) for values in rows if len(values) > 1]
    return sqrt(mean(several)) if several else 0.0


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
    spread = f", sd {100 * _spread(filled):.2f}" if any(len(values) > 1 for values in filled) else ""
    return f"{name} {100 * mean(map(mean, filled)):.2f} %{spread}"


def _label(schedule: str, initialisation: str) -> str:
    return f"{schedule}, {initialisation}"


def _row(label: str) -> tuple[str, str]:
    schedule, _, initialisation = label.partition(", ")
    return schedule, initialisation


def study(size: Size = "here", *, seeds: tuple[int, ...] = SEEDS) -> Study:
    """Five seeds of every initialisation under every schedule, at two learning rates."""
    rates, shapes, starts, given = RATES, SCHEDULES, INITIALISATIONS, COMMON
    if size == "smoke":
        rates = {"usual rate": 2e-3}
        shapes = {name: SCHEDULES[name] for name in (SERIAL, "joint")}
        starts = {name: INITIALISATIONS[name] for name in ("default", "√(log 2L)")}
        given, seeds = {**COMMON, **schedules.DIGITS, "precision": "float32", "budget": "2048 layer_evals"}, seeds[:2]
    elif size == "paper":
        rates = {"usual rate": 1e-4, "high rate": 1e-3}
        serial = {"model": "vit_tiny", "depth": 16, "schedule": "joint"}
        own = {name: serial if name == SERIAL else SCHEDULES[name][1] for name in SCHEDULES}
        shapes = {name: ("paraformer_authors_224", options) for name, options in own.items()}
        given = {**schedules.AUTHORS, "budget": f"{300 * 45_000 * 16} layer_evals"}
    cells = []
    for group, rate in rates.items():
        for schedule, (recipe, shape) in shapes.items():
            for initialisation, start in starts.items():
                slug = f"{group} {schedule} {initialisation}".replace("√(log 2L)", "deep").replace(" ", "-")
                options = {**given, **shape, **start, "learning_rate": rate}
                label = _label(schedule, initialisation)
                cells += [Cell(f"{slug}-{seed}", group, label, recipe, options, seed) for seed in seeds]
    return Study(
        name="stability",
        title="Stability over seeds and initialisations",
        question="How much does a result depend on the seed, under which initialisation and schedule, and what fails?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES if size == "here" else {},
        may_diverge=True,
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
    )
