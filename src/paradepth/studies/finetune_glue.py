"""Does it matter for fine-tuning whether a model was pretrained serially or layer-parallel?

Masked language models of 12 layers of width 64 and step 1/12 on Tiny Shakespeare, then three tasks of GLUE. The paper
finds differences of up to 1.2 points of accuracy (Layer-Parallel Training for Transformers, arXiv 2601.09026). What the
same network reaches without pretraining stands beside it, since a small difference means little where pretraining does
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from paradepth.studies.record import measured
from paradepth.studies.study import Cell, Size, Study
from paradepth.studies.tasks import COMMON, MGRIT, show

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
NOTES = {
    PRETRAINING: "Masked language models on Tiny Shakespeare, BPE of 1024 tokens, 600 batches of 32 windows of 64; "
    "accuracy of the hidden tokens.",
    "SST-2": "800 batches of 32 sentences; tested on GLUE's validation split.",
    "CoLA": "800 batches of 32 sentences; tested on GLUE's validation split. 69 % of it are acceptable.",
    "MRPC": "400 batches of 32 pairs; tested on the test split. 66 % of it are equivalent.",
}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task the difference that the kind of pretraining makes, against the paper's."""

    def of(group: str, label: str, key: str) -> list[float]:
        return [measured(r, key)[-1] for r in records if (r["group"], r["label"]) == (group, label)]

    serial, parallel = (mean(of(PRETRAINING, label, "loss")) for label in (SERIAL, PARALLEL))
    texts = [f"Pretraining: loss {serial:.4f} serially, {parallel:.4f} layer-parallel."]
    for task, (data, _) in TUNED.items():
        found = {label: of(task, label, "accuracy") for label in (SERIAL, PARALLEL, SCRATCH)}
        difference = mean(found[PARALLEL]) - mean(found[SERIAL])
        shown = {label: show("accuracy", values) for label, values in found.items()}
        text = (
            f"{task}: accuracy {shown[SERIAL]} from serial and {shown[PARALLEL]} from layer-parallel pretraining, "
            f"{100 * abs(difference):.2f} points {'more' if difference > 0 else 'less'}: "
            f"{'within' if abs(difference) <= PAPER else 'not within'} the paper's {100 * PAPER:g}. "
            f"Without pretraining {shown[SCRATCH]}."
        )
        if data == "cola":
            scores = [f"{mean(of(task, label, 'matthews')):.3f} ({label})" for label in found]
            text += f" Matthews' correlation: {', '.join(scores)}."
        texts.append(text)
    return texts


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Serial and layer-parallel pretraining, each fine-tuned on three tasks."""
    pretrained = {
        label: [
            Cell(f"pretraining-{label}-{s}", PRETRAINING, label, "bert_mini", {**BERT, **options}, s) for s in seeds
        ]
        for label, options in ((SERIAL, {}), (PARALLEL, MGRIT))
    }
    cells = [cell for of_label in pretrained.values() for cell in of_label]
    for task, (data, budget) in TUNED.items():
        for label, sources in pretrained.items():
            for source in sources:
                cell = Cell(
                    f"{data}-{label}-{source.seed}", task, label, data, {**TUNING, "budget": budget}, source.seed
                )
                cells.append(replace(cell, after=source))
        fresh = {**COMMON, **SHAPE, **TUNING, "model": "text_classifier_nano", "data": data, "vocab_size": 1024}
        fresh |= {"budget": budget, "validation_fraction": 0.05}
        cells += [Cell(f"{data}-scratch-{s}", task, SCRATCH, "glue_from_scratch", fresh, s) for s in seeds]
    return Study(
        name="finetune_glue",
        title="Fine-tuning after serial and layer-parallel pretraining",
        question="Does a masked language model that was trained layer-parallel fine-tune as well as one that was "
        "trained serially?",
        cells=tuple(cells),
        findings=findings,
        notes=NOTES,
    )
