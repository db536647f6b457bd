"""Do branches beat a serial stack outside vision, and does layer-parallel training reach its serial counterpart?

Four tasks on texts, at a size where a run takes one to five minutes: 12 layers of width 64. All rows of a task spend
the same number of layer evaluations and, but for one, have the same number of parameters. Two serial stacks of that
depth: an ordinary one (h = 1), which is what branches are held against, and one of step h = 1/12, the network that
layer-parallel training solves. The exception is a serial stack as shallow as one branch, which takes three times as
many steps: what `stagewise` saves on its early stages, it saves as well.
"""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.record import measured
from paradepth.studies.study import Cell, Size, Study

LOSS_LIMIT = 0.01  # layer-parallel training with the controller is to be this close: part of the serial loss,
LIMITS = {"accuracy": 0.005, "bleu": 0.5}  # and of the headline, where it is another measure

SERIAL, SHALLOW, ODE = "serial", "serial, depth 4", "serial, h = 1/12"
PARALLEL, CONTROLLED = "layer-parallel", "layer-parallel, controller"
BRANCHES = ("PF 3×4 joint", "PF 3×4 one_pass", "PF 3×4 stagewise")

# Whatever a recipe may come to choose otherwise.
COMMON: dict[str, Any] = {
    "width": 64,
    "heads": 2,
    "mlp": 256,
    "dropout": 0.0,
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "warmup": 0.1,
    "decay": "cosine",
    "label_smoothing": 0.0,
    "ema": 0.0,
    "validations": 5,
}
# Six intervals of two layers: one iteration leaves four of them inexact.
MGRIT: dict[str, Any] = {"executor": "mgrit", "levels": 2, "coarsening": 2, "relaxation": "F", "coarse": "branch"}
MGRIT |= {"forward_iterations": 1, "backward_iterations": 1, "recompute": False}
# The paper's threshold of 1 is for hundreds of batches with gradients that are off by several per cent; this one asks
# for more iterations as soon as one does not take two thirds off the residual.
CONTROL: dict[str, Any] = {"control": True, "probe_every": 25, "rho_threshold": 0.3, "rho_return": 0.05}
CONTROL |= {"probe_patience": 1, "max_iterations": 4}

# Recipe, options, and the measure that rows are compared by. A translator's depth is that of its encoder and of its
# decoder: its 12 layers are 6 and 6, and those of a branch two and two.
TASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "causal language model": (
        "shakespeare_gpt",
        {"model": "gpt_nano", "context": 64, "batch_size": 16, "budget": "76800 layer_evals"},
        "loss",
    ),
    "masked language model": (
        "bert_mini",
        {
            "model": "bert_nano",
            "data": "tiny_shakespeare",
            "validation_fraction": 0.05,
            "tokenizer": "bytes",
            "vocab_size": None,
            "masking": 0.15,
            "context": 32,
            "batch_size": 32,
            "learning_rate": 4e-3,
            "budget": "230400 layer_evals",
        },
        "accuracy",
    ),
    "tagging": (
        "ewt_tagger",
        {
            "model": "tagger_nano",
            "tags": "upos",
            "word_dropout": 0.1,
            "batch_size": 32,
            "optimiser": "adamw",
            "learning_rate": 3e-3,
            "budget": "230400 layer_evals",
        },
        "accuracy",
    ),
    "translation": (
        "multi30k_transformer",
        {"model": "translator_nano", "vocab_size": 2000, "batch_size": 32, "budget": "307200 layer_evals"},
        "bleu",
    ),
}
NOTES = {
    "causal language model": "Tiny Shakespeare, bytes: 400 batches of 16 windows of 64.",
    "masked language model": "Tiny Shakespeare, bytes, 15 % hidden: 600 batches of 32 windows of 32.",
    "tagging": "Universal Dependencies' English Web Treebank, parts of speech: 1.5 passes, 600 batches of 32.",
    "translation": "Multi30k from German to English, 0.9 passes, 800 batches of 32; beam search on the 2016 test.",
}


def rows(task: str) -> dict[str, dict[str, Any]]:
    """The rows of a task: label and options."""
    half = 2 if task == "translation" else 1
    stack: dict[str, Any] = {"branches": 0, "depth": 12 // half, "schedule": "joint", "step": 1.0, "buffers": [0, 0]}
    parallel = stack | {"step": 1 / 12}
    branches = stack | {"branches": 3, "depth": 4 // half}
    joint, one_pass, stagewise = BRANCHES
    return {
        SERIAL: stack,
        SHALLOW: stack | {"depth": 4 // half},
        ODE: parallel,
        joint: branches,
        one_pass: branches | {"schedule": "one_pass"},
        stagewise: branches | schedules.STAGEWISE,
        PARALLEL: parallel | MGRIT,
        CONTROLLED: parallel | MGRIT | CONTROL,
    }


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task: branches against the serial stack, and layer-parallel training against its serial counterpart."""
    texts = []
    for task, (_, _, key) in TASKS.items():
        found: dict[str, dict[str, list[float]]] = {}
        for record in records:
            if record["group"] == task:
                row = found.setdefault(record["label"], {"loss": [], key: []})
                for name in row:
                    row[name].append(measured(record, name)[-1])
        texts.append(_about_branches(task, key, found))
        texts.append(_about_layers(task, key, found))
    return texts


def _about_branches(task: str, key: str, found: dict[str, dict[str, list[float]]]) -> str:
    """Which schedules of branches win against the serial stack, by more than the seeds' spread; and the shallow one."""
    said: dict[str, list[str]] = {"better": [], "worse": [], "not told apart from it by these seeds": []}
    for label in BRANCHES:
        ours, theirs = found[label][key], found[SERIAL][key]
        gain = (mean(ours) - mean(theirs)) * (-1 if key == "loss" else 1)
        better, worse, same = said
        verdict = same if abs(gain) <= doubt(ours, theirs) else better if gain > 0 else worse
        said[verdict].append(f"{label} {show(key, ours)}")
    parts = [f"{verdict}: {', '.join(labels)}" for verdict, labels in said.items() if labels]
    return (
        f"{task.capitalize()}, {key}: the serial stack has {show(key, found[SERIAL][key])}. {'; '.join(parts)}. "
        f"A serial stack of a third of the layers, in three times the steps: {show(key, found[SHALLOW][key])}."
    )


def _about_layers(task: str, key: str, found: dict[str, dict[str, list[float]]]) -> str:
    """How far layer-parallel training is from serial training of the same network."""
    serial, parts = found[ODE], []
    for label in (PARALLEL, CONTROLLED):
        excess = mean(found[label]["loss"]) / mean(serial["loss"]) - 1
        part = f"{label} has a loss {100 * abs(excess):.2f} % {'above' if excess > 0 else 'below'} serial training"
        close = excess <= LOSS_LIMIT
        if key in LIMITS:
            behind = mean(serial[key]) - mean(found[label][key])
            close = close and behind <= LIMITS[key]
            unit, factor = ("points of accuracy", 100.0) if key == "accuracy" else ("BLEU", 1.0)
            part += f", and {factor * abs(behind):.2f} {unit} {'less' if behind > 0 else 'more'}"
        limit = f"{100 * LOSS_LIMIT:.0f} % of the loss" + (f" and {_limit(key)}" if key in LIMITS else "")
        parts.append(f"{part}: {'within' if close else 'not within'} {limit}")
    return f"{task.capitalize()}, the network of step 1/12: {'; '.join(parts)}."


def _limit(key: str) -> str:
    return f"{100 * LIMITS[key]:g} points" if key == "accuracy" else f"{LIMITS[key]:g} BLEU"


def doubt(ours: list[float], theirs: list[float]) -> float:
    """Two standard errors of the difference of two means; 0 for single seeds, where there is no telling."""
    if min(len(ours), len(theirs)) < 2:
        return 0.0
    return 2 * sqrt(stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs))


def show(key: str, values: list[float]) -> str:
    """Mean and deviation of a measure over the seeds.

    >>> show("accuracy", [0.5, 0.52]), show("loss", [1.25])
    ('51.00 ± 1.41', '1.2500')
    """
    factor, digits = {"accuracy": (100.0, 2), "loss": (1.0, 4)}.get(key, (1.0, 2))
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Serial stacks, branches under three schedules, and layer-parallel training, on four tasks."""
    cells = []
    for task, (recipe, options, _) in TASKS.items():
        for label, own in rows(task).items():
            slug = f"{task} {label}".translate(str.maketrans({"×": "x", "/": "-", ",": "", "=": ""}))
            slug = "-".join(slug.lower().split())
            cells += [Cell(f"{slug}-{s}", task, label, recipe, {**COMMON, **options, **own}, s) for s in seeds]
    return Study(
        name="tasks",
        title="Branches and layers in parallel, on four tasks",
        question="At equal parameters and compute, do branches beat a serial stack on texts, and does layer-parallel "
        "training reach what serial training of the same network reaches?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES,
        headline={task: key for task, (_, _, key) in TASKS.items()},
    )
