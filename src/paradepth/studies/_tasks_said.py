"""What the study of tasks says of its records: findings and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

from paradepth.studies.claim import LAYER_PARALLEL, PARAFORMER, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, answer, compare, show

# The measure that the rows of a task are compared by.
KEYS = {"causal language model": "loss", "masked language model": "accuracy", "tagging": "accuracy"}
KEYS["translation"] = "bleu"

ON_TEXTS, TAGGING, TRANSLATION = "branches-on-texts", "layer-parallel-tagging", "layer-parallel-translation"
SWITCH, BACK = "language-models-need-the-switch", "switching-in-both-directions"
CLAIMS = (
    Claim(ON_TEXTS, "Do branches beat a serial stack on texts, too?", PARAFORMER, "question"),
    Claim(TAGGING, "Tagging: layer-parallel training ends with the accuracy of serial training.", LAYER_PARALLEL),
    Claim(
        TRANSLATION,
        "Translation: layer-parallel training ends with a slightly lower BLEU, which the switch recovers.",
        LAYER_PARALLEL,
    ),
    Claim(
        SWITCH,
        "Language models (BERT, GPT-2): layer-parallel training needs the indicator and its switch to reach what "
        "serial training reaches.",
        LAYER_PARALLEL,
    ),
    Claim(
        BACK,
        "Does a controller that goes back to fewer iterations, too, keep what serial training reaches?",
        LAYER_PARALLEL,
        "question",
    ),
)
PROTOCOL = (
    "Four tasks, 12 layers of width 64, the same number of layer evaluations and of parameters for every row of a task "
    "but the shallow serial stack. Branches are held against a serial stack of step 1; layer-parallel training against "
    "serial training of the same network of step 1/12. Layer-parallel training is to be within 1 % of the loss, 0.5 "
    "points of accuracy and 0.5 BLEU; other differences count where they exceed two standard errors over the seeds."
)

LOSS_LIMIT = 0.01  # layer-parallel training with the controller is to be this close: part of the serial loss,
LIMITS = {"accuracy": 0.005, "bleu": 0.5}  # and of the headline, where it is another measure

SERIAL, SHALLOW, ODE = "serial", "serial, depth 4", "serial, h = 1/12"
PARALLEL, CONTROLLED = "layer-parallel", "layer-parallel, controller"
BRANCHES = ("PF 3×4 joint", "PF 3×4 one_pass", "PF 3×4 stagewise")


_Found = dict[str, dict[str, list[float]]]  # by label and measure, a value for each seed


@dataclass(frozen=True)
class _Task:
    """What was found of a task, and which row is which."""

    key: str
    found: _Found

    def first(self, start: str) -> str:
        return next(label for label in self.found if label.startswith(start))

    @property
    def shallow(self) -> str:
        return self.first("serial, depth")

    @property
    def same_network(self) -> str:
        return next(label for label in self.found if label.startswith(("serial, h", "serial, the")))

    @property
    def branches(self) -> list[str]:
        return [label for label in self.found if label.startswith("PF")]

    @property
    def best(self) -> str:
        """The best of the branches."""
        sign = -1 if self.key == "loss" else 1
        return max(self.branches, key=lambda label: sign * mean(self.found[label][self.key]))

    def compare(self, ours: str, theirs: str) -> Compared:
        return compare(self.found[ours][self.key], self.found[theirs][self.key], lower=self.key == "loss")

    def is_close(self, label: str) -> bool:
        """Whether layer-parallel training is within the limits of serial training of the same network."""
        serial, ours = self.found[self.same_network], self.found[label]
        close = mean(ours["loss"]) / mean(serial["loss"]) - 1 <= LOSS_LIMIT
        return close and (self.key not in LIMITS or mean(serial[self.key]) - mean(ours[self.key]) <= LIMITS[self.key])


def _found(records: list[dict[str, Any]]) -> dict[str, _Task]:
    tasks: dict[str, _Task] = {}
    for name, rows in by_row(records).items():
        key = KEYS[name]
        tasks[name] = _Task(
            key, {label: {of: last(seeds, of) for of in ("loss", key)} for label, seeds in rows.items()}
        )
    return tasks


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task: branches against the serial stack, and layer-parallel training against its serial counterpart."""
    texts = []
    for name, task in _found(records).items():
        texts.append(_about_branches(name, task))
        texts.append(_about_layers(name, task))
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Branches must beat the serial stack on every task; that a shallow serial stack beats them is a condition.
    Layer-parallel training holds where its row is within the limits, with conditions where only the controlled one
    is. The switch is needed where the plain row is not within the limits and the controlled one is."""
    tasks = _found(records)
    made = {ON_TEXTS: _on_texts(tasks), BACK: _both_directions(tasks)}
    made[TAGGING] = _same_accuracy(tasks.get("tagging"))
    made[TRANSLATION] = _recovered(tasks.get("translation"))
    return {**made, SWITCH: _needed({name: task for name, task in tasks.items() if name.endswith("language model")})}


def _on_texts(tasks: dict[str, _Task]) -> Verdict:
    wins, beaten, parts = 0, 0, []
    for name, task in tasks.items():
        best = task.best
        wins += task.compare(best, SERIAL) == Compared.BETTER
        beaten += task.compare(best, task.shallow) == Compared.WORSE
        shown = ", ".join(
            f"{label} {show(task.key, task.found[label][task.key])}" for label in (best, SERIAL, task.shallow)
        )
        parts.append(f"{name} ({task.key}): {shown}")
    figure = f"{'; '.join(parts)}. Better than the serial stack of as many layers on {wins} of {len(tasks)} tasks"
    if beaten:
        figure += f"; a serial stack as shallow as a branch, in more steps, is better still on {beaten}"
    held = "holds with conditions" if beaten or wins < len(tasks) else "holds"
    return Verdict(held if wins else "does not hold", f"{figure}.")


NOT_RUN = Verdict("could not be tested here", "The task is not part of this size of the study.")


def _same_accuracy(task: _Task | None) -> Verdict:
    if task is None:
        return NOT_RUN
    figure = f"{_against_serial(task, PARALLEL)}; {_against_serial(task, CONTROLLED)}."
    close = "holds" if task.is_close(PARALLEL) else "holds with conditions"
    return Verdict(close if task.is_close(PARALLEL) or task.is_close(CONTROLLED) else "does not hold", figure)


def _recovered(task: _Task | None) -> Verdict:
    if task is None:
        return NOT_RUN
    figure = f"{_against_serial(task, PARALLEL)}; {_against_serial(task, CONTROLLED)}."
    if not task.is_close(CONTROLLED):
        return Verdict("does not hold", figure)
    if task.compare(PARALLEL, task.same_network) == Compared.WORSE:
        return Verdict("holds", figure)
    return Verdict("holds with conditions", f"{figure} Without the switch there is no loss either at this depth.")


def _needed(tasks: dict[str, _Task]) -> Verdict:
    if not tasks:
        return NOT_RUN
    needed = [not task.is_close(PARALLEL) and task.is_close(CONTROLLED) for task in tasks.values()]
    parts = [
        f"{name}: {_against_serial(task, PARALLEL)}, {_against_serial(task, CONTROLLED)}"
        for name, task in tasks.items()
    ]
    figure = f"{'; '.join(parts)}. Needed, and enough, for {sum(needed)} of {len(tasks)}."
    return Verdict(answer(needed), figure)


def _both_directions(tasks: dict[str, _Task]) -> Verdict:
    close = [task.is_close(CONTROLLED) for task in tasks.values()]
    parts = [f"{name}: {_against_serial(task, CONTROLLED)}" for name, task in tasks.items()]
    return Verdict(answer(close), f"{'; '.join(parts)}. Within the limits on {sum(close)} of {len(tasks)} tasks.")


def _against_serial(task: _Task, label: str) -> str:
    """How much worse than serial training of the same network."""
    serial, ours = task.found[task.same_network], task.found[label]
    text = f"{label}: loss {100 * (mean(ours['loss']) / mean(serial['loss']) - 1):+.2f} %"
    if task.key in LIMITS:
        factor, unit = (100.0, "points") if task.key == "accuracy" else (1.0, "BLEU")
        text += f" and {factor * (mean(ours[task.key]) - mean(serial[task.key])):+.2f} {unit}"
    return text.replace("-0.00", "0.00").replace("+0.00", "0.00")


_WORDS = {
    Compared.BETTER: "better",
    Compared.WORSE: "worse",
    Compared.SAME: "not told apart from it by these seeds",
}


def _about_branches(name: str, task: _Task) -> str:
    """Which schedules of branches win against the serial stack, by more than the seeds' spread; and the shallow one."""
    key, found = task.key, task.found
    said: dict[Compared, list[str]] = {result: [] for result in _WORDS}
    for label in task.branches:
        said[task.compare(label, SERIAL)].append(f"{label} {show(key, found[label][key])}")
    parts = [f"{_WORDS[result]}: {', '.join(labels)}" for result, labels in said.items() if labels]
    shallow = "A serial stack of a third of the layers, in three times the steps"
    return (
        f"{name.capitalize()}, {key}: the serial stack has {show(key, found[SERIAL][key])}. {'; '.join(parts)}. "
        f"{shallow if task.shallow == SHALLOW else task.shallow.capitalize()}: {show(key, found[task.shallow][key])}."
    )


def _about_layers(name: str, task: _Task) -> str:
    """How far layer-parallel training is from serial training of the same network."""
    key, found, serial, parts = task.key, task.found, task.found[task.same_network], []
    for label in (PARALLEL, CONTROLLED):
        excess = mean(found[label]["loss"]) / mean(serial["loss"]) - 1
        part = f"{label} has a loss {100 * abs(excess):.2f} % {'above' if excess > 0 else 'below'} serial training"
        if key in LIMITS:
            behind = mean(serial[key]) - mean(found[label][key])
            unit, factor = ("points of accuracy", 100.0) if key == "accuracy" else ("BLEU", 1.0)
            part += f", and {factor * abs(behind):.2f} {unit} {'less' if behind > 0 else 'more'}"
        limit = f"{100 * LOSS_LIMIT:.0f} % of the loss" + (f" and {_limit(key)}" if key in LIMITS else "")
        parts.append(f"{part}: {'within' if task.is_close(label) else 'not within'} {limit}")
    network = "step 1/12" if task.same_network == ODE else "the paper's step"
    return f"{name.capitalize()}, the network of {network}: {'; '.join(parts)}."


def _limit(key: str) -> str:
    return f"{100 * LIMITS[key]:g} points" if key == "accuracy" else f"{LIMITS[key]:g} BLEU"
