"""Does it matter for fine-tuning whether a model was pretrained serially or layer-parallel?

Masked language models of 12 layers of width 64 and step 1/12 on Tiny Shakespeare, then three tasks of GLUE. The paper
finds differences of up to 1.2 points of accuracy (Layer-Parallel Training for Transformers, arXiv 2601.09026). What the
same network reaches without pretraining stands beside it, since a small difference means little where pretraining does
nothing. At size "paper" BERT of 128 layers on C4 and the paper's tasks, CoLA, MRPC and QNLI.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from paradepth.studies.claim import LAYER_PARALLEL, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, compare, show
from paradepth.studies.study import Cell, Size, Study
from paradepth.studies.tasks import COMMON, MGRIT

DIFFERENCES, DOWNSTREAM = "glue-differences", "downstream-accuracy"
CLAIMS = (
    Claim(
        DIFFERENCES,
        "Fine-tuned on GLUE, layer-parallel and serial pretraining differ by at most 1.2 points of accuracy.",
        LAYER_PARALLEL,
    ),
    Claim(
        DOWNSTREAM,
        "Is a model that was pretrained layer-parallel as good downstream as one that was pretrained serially? (Plots "
        "of the pretraining loss do not tell.)",
        LAYER_PARALLEL,
        "question",
    ),
)
PROTOCOL = (
    "The same network, data, batches and number of steps, pretrained serially and layer-parallel; each fine-tuned with "
    "the same options, serially. Mean accuracy over the seeds; the paper's limit is 1.2 points. Pretraining counts as "
    "useful where it exceeds training from scratch by two standard errors."
)
PAPER = 0.012  # the largest difference in accuracy that the paper reports
PRETRAINING = "pretraining"
SERIAL, PARALLEL, SCRATCH = "serial", "layer-parallel", "no pretraining"
SHAPE: dict[str, Any] = {"branches": 0, "depth": 12, "step": 1 / 12, "buffers": [0, 0], "context": 64}
BERT: dict[str, Any] = {
    **COMMON,
    **SHAPE,
    "model": "bert_nano",
    "data": "tiny_shakespeare",
    "validation_fraction": 0.05,
    "tokenizer": "bpe",
    "vocab_size": 1024,
    "masking": 0.15,
    "batch_size": 32,
    "learning_rate": 4e-3,
    "budget": "600 steps",
}
TUNING: dict[str, Any] = {
    "dropout": 0.1,
    "optimiser": "adamw",
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "decay": "cosine",
    "label_smoothing": 0.0,
    "batch_size": 32,
    "validations": 3,
}
TUNED: dict[str, tuple[str, str]] = {"SST-2": ("sst2", "800 steps"), "CoLA": ("cola", "800 steps")}
TUNED["MRPC"] = ("mrpc", "400 steps")
PAPER_TUNED = {"CoLA": ("cola", "8 epochs"), "MRPC": ("mrpc", "8 epochs"), "QNLI": ("qnli", "3 epochs")}
SMALL: dict[str, Any] = {"width": 8, "mlp": 16, "context": 16, "vocab_size": 300, "batch_size": 8, "validations": 1}
NOTES = {
    PRETRAINING: "Masked language models on Tiny Shakespeare, BPE of 1024 tokens, 600 batches of 32 windows of 64; "
    "accuracy of the hidden tokens.",
    "SST-2": "800 batches of 32 sentences; tested on GLUE's validation split.",
    "CoLA": "800 batches of 32 sentences; tested on GLUE's validation split. 69 % of it are acceptable.",
    "MRPC": "400 batches of 32 pairs; tested on the test split. 66 % of it are equivalent.",
}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task the difference that the kind of pretraining makes, against the paper's."""
    rows = by_row(records)
    serial, parallel = (mean(last(rows[PRETRAINING][label], "loss")) for label in (SERIAL, PARALLEL))
    texts = [f"Pretraining: loss {serial:.4f} serially, {parallel:.4f} layer-parallel."]
    for task, (data, _) in {**TUNED, **PAPER_TUNED}.items():
        if task not in rows:
            continue
        found = {label: last(rows[task][label], "accuracy") for label in (SERIAL, PARALLEL, SCRATCH)}
        difference = mean(found[PARALLEL]) - mean(found[SERIAL])
        shown = {label: show("accuracy", values) for label, values in found.items()}
        text = (
            f"{task}: accuracy {shown[SERIAL]} from serial and {shown[PARALLEL]} from layer-parallel pretraining, "
            f"{100 * abs(difference):.2f} points {'more' if difference > 0 else 'less'}: "
            f"{'within' if abs(difference) <= PAPER else 'not within'} the paper's {100 * PAPER:g}. "
            f"Without pretraining {shown[SCRATCH]}."
        )
        if data == "cola":
            scores = [f"{mean(last(rows[task][label], 'matthews')):.3f} ({label})" for label in found]
            text += f" Matthews' correlation: {', '.join(scores)}."
        texts.append(text)
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """The differences of the means against the paper's limit; that pretraining helps no task is a condition. The
    second verdict asks whether serial pretraining is better by more than two standard errors on some task."""
    rows = by_row(records)
    tasks = [task for task in rows if task != PRETRAINING]
    accuracy = {(task, label): last(of, "accuracy") for task in tasks for label, of in rows[task].items()}
    differences = {task: mean(accuracy[task, PARALLEL]) - mean(accuracy[task, SERIAL]) for task in tasks}
    useful = [task for task in tasks if compare(accuracy[task, SERIAL], accuracy[task, SCRATCH]) == Compared.BETTER]
    worse = [task for task in tasks if compare(accuracy[task, PARALLEL], accuracy[task, SERIAL]) == Compared.WORSE]
    shown = ", ".join(f"{task} {100 * difference:+.2f}" for task, difference in differences.items())
    help_ = "Pretraining of this size helps " + (f"on {', '.join(useful)}." if useful else "on none of these tasks.")
    figure = f"Layer-parallel against serial pretraining, points of accuracy: {shown}. {help_}"
    within = all(abs(difference) <= PAPER for difference in differences.values())
    small = "holds" if within and useful else "holds with conditions" if within else "does not hold"
    told = f"Worse by more than two standard errors on {len(worse)} of {len(tasks)} tasks. {help_}"
    as_good = "does not hold" if worse else "holds" if useful else "holds with conditions"
    return {DIFFERENCES: Verdict(small, figure), DOWNSTREAM: Verdict(as_good, told)}


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Serial and layer-parallel pretraining, each fine-tuned on three tasks."""
    recipe, bert, tuning, tuned = "bert_mini", BERT, TUNING, TUNED
    fresh = {**COMMON, **SHAPE, **TUNING, "model": "text_classifier_nano", "vocab_size": 1024}
    ways: dict[str, dict[str, Any]] = {SERIAL: {}, PARALLEL: MGRIT}
    folder = ""
    if size == "smoke":
        bert, seeds, tuned = {**BERT, **SMALL, "budget": "4 steps"}, seeds[:1], {"SST-2": ("sst2", "4 steps")}
        few = {"batch_size": 8, "validations": 1}
        tuning, fresh = {**TUNING, **few}, {**fresh, **SMALL}
    elif size == "paper":
        recipe, bert, folder = "bert_c4", {}, "c4"
        ways = {SERIAL: {"executor": "serial", "control": False}, PARALLEL: {}}
        tuning = {**TUNING, "learning_rate": 2e-5}
        tuned = PAPER_TUNED
        fresh = {**tuning, "model": "text_classifier_base", "depth": 128, "context": 224, "vocab_size": 30522}
    pretrained = {
        label: [
            Cell(f"pretraining-{label}-{s}", PRETRAINING, label, recipe, {**bert, **options}, s, folder=folder)
            for s in seeds
        ]
        for label, options in ways.items()
    }
    cells = [cell for of_label in pretrained.values() for cell in of_label]
    for task, (data, budget) in tuned.items():
        for label, sources in pretrained.items():
            for source in sources:
                cell = Cell(
                    f"{data}-{label}-{source.seed}", task, label, data, {**tuning, "budget": budget}, source.seed
                )
                cells.append(replace(cell, after=source))
        given = {**fresh, "data": data, "budget": budget, "validation_fraction": 0.05}
        cells += [Cell(f"{data}-scratch-{s}", task, SCRATCH, "glue_from_scratch", given, s) for s in seeds]
    return Study(
        name="finetune_glue",
        title="Fine-tuning after serial and layer-parallel pretraining",
        question="Does a masked language model that was trained layer-parallel fine-tune as well as one that was "
        "trained serially?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES if size == "here" else {},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
    )
