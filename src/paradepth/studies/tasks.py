"""Do branches beat a serial stack outside vision, and does layer-parallel training reach its serial counterpart?

Four tasks on texts, at a size where a run takes one to five minutes: 12 layers of width 64. All rows of a task spend
the same number of layer evaluations and, but for one, have the same number of parameters. Two serial stacks of that
depth: an ordinary one (h = 1), which is what branches are held against, and one of step h = 1/12, the network that
layer-parallel training solves. The exception is a serial stack as shallow as one branch, which takes three times as
many steps: what `stagewise` saves on its early stages, it saves as well.

At size "paper" the networks of the layer-parallel paper with its MGRIT settings: 64 layers for tagging, 6 + 6 for
translation, 2 + 16 + 2 of GPT-2, 128 of BERT. Its data lie in folders of the data folder: openwebtext, c4, opus.
"""

from __future__ import annotations

from typing import Any

from paradepth.studies import schedules
from paradepth.studies._tasks_said import (
    BRANCHES,
    CLAIMS,
    CONTROLLED,
    KEYS,
    ODE,
    PARALLEL,
    PROTOCOL,
    SERIAL,
    SHALLOW,
    findings,
    verdicts,
)
from paradepth.studies.study import Cell, Size, Study

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

# Recipe and options. A translator's depth is that of its encoder and of its
# decoder: its 12 layers are 6 and 6, and those of a branch two and two.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal language model": (
        "shakespeare_gpt",
        {"model": "gpt_nano", "context": 64, "batch_size": 16, "budget": "76800 layer_evals"},
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
    ),
    "translation": (
        "multi30k_transformer",
        {"model": "translator_nano", "vocab_size": 2000, "batch_size": 32, "budget": "307200 layer_evals"},
    ),
}
NOTES = {
    "causal language model": "Tiny Shakespeare, bytes: 400 batches of 16 windows of 64.",
    "masked language model": "Tiny Shakespeare, bytes, 15 % hidden: 600 batches of 32 windows of 32.",
    "tagging": "Universal Dependencies' English Web Treebank, parts of speech: 1.5 passes, 600 batches of 32.",
    "translation": "Multi30k from German to English, 0.9 passes, 800 batches of 32; beam search on the 2016 test.",
}


SMOKE: dict[str, Any] = {"width": 8, "mlp": 16, "context": 16, "batch_size": 4, "validations": 2}
PAPER_LAYERS = {"causal language model": 20, "masked language model": 128, "tagging": 64, "translation": 12}
PAPER_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal language model": ("gpt2_openwebtext", {}),
    "masked language model": ("bert_c4", {}),
    "tagging": ("mc_gum_published", {}),
    "translation": ("opus_published", {}),
}
PAPER_FOLDERS = {"causal language model": "openwebtext", "masked language model": "c4", "translation": "opus"}


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


def paper_rows(task: str) -> dict[str, dict[str, Any]]:
    """The same at the paper's size: what the recipe says of the network and of MGRIT stays."""
    half = 2 if task == "translation" else 1
    layers = PAPER_LAYERS[task] // half
    count = 3 if task == "translation" else 4 if layers == 20 else 8
    serial: dict[str, Any] = {"executor": "serial", "control": False}
    stack = {**serial, "branches": 0, "depth": layers, "schedule": "joint", "step": 1.0, "buffers": [0, 0]}
    branches = stack | {"branches": count, "depth": layers // count}
    shape = f"PF {count}×{PAPER_LAYERS[task] // count}"
    return {
        SERIAL: stack,
        f"serial, depth {PAPER_LAYERS[task] // count}": stack | {"depth": layers // count},
        "serial, the paper's step": serial,
        f"{shape} joint": branches,
        f"{shape} one_pass": branches | {"schedule": "one_pass"},
        f"{shape} stagewise": branches | schedules.STAGEWISE,
        PARALLEL: {"control": False, "probe_every": None},
        CONTROLLED: {"control": True, "probe_every": 500},
    }


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Serial stacks, branches under three schedules, and layer-parallel training, on four tasks."""
    chosen, common = (PAPER_TASKS, {}) if size == "paper" else (TASKS, COMMON)
    small: dict[str, Any] = {}
    if size == "smoke":
        chosen, seeds = {name: TASKS[name] for name in ("causal language model",)}, seeds[:1]
        small = {**SMOKE, "budget": "384 layer_evals"}
    cells = []
    for task, (recipe, options) in chosen.items():
        of_task = paper_rows(task) if size == "paper" else rows(task)
        for label, own in of_task.items():
            slug = f"{task} {label}".translate(str.maketrans({"×": "x", "/": "-", ",": "", "=": "", "'": ""}))
            slug = "-".join(slug.lower().split())
            given = {**common, **options, **small, **own}
            folder = PAPER_FOLDERS.get(task, "") if size == "paper" else ""
            cells += [Cell(f"{slug}-{s}", task, label, recipe, given, s, folder=folder) for s in seeds]
    return Study(
        name="tasks",
        title="Branches and layers in parallel, on four tasks",
        question="At equal parameters and compute, do branches beat a serial stack on texts, and does layer-parallel "
        "training reach what serial training of the same network reaches?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES if size == "here" else {},
        headline={task: KEYS[task] for task in chosen},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
    )
