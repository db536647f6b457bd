"""Does training on many images help with few of another kind, and do branches or a serial stack transfer better?

The protocol of Para-Former (Dynamic Universal Approximation Theory, arXiv 2407.21670): train on a large set, fine-tune
on a small one. Here CIFAR-100, then 1, 5, 10 and 100 % of CIFAR-10 (the same kind of images, other classes) and of
Fashion-MNIST (another kind; grey values are repeated, 28 pixels become 32). 8 layers of width 64: 4 branches of 2, or
a serial stack. Every fine-tuned model stands beside the same network trained from scratch on the same images for the
same number of layer evaluations, and, at one fraction, for as many as pretraining and fine-tuning took together.

At full size: `paradepth train cifar100_paraformer`, `cifar100_vit`, then `paradepth finetune RUN --task cifar10
--train-fraction 0.01`.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.record import measured
from paradepth.studies.study import Cell, Size, Study
from paradepth.studies.tasks import doubt, show

PRETRAINING = "pretraining on CIFAR-100"
BRANCHES, SERIAL = "PF 4×2", "serial"
TUNED, SCRATCH, LONG = "fine-tuned", "from scratch", "from scratch, with the compute of pretraining, too"
SETS = {"CIFAR-10": "cifar10", "Fashion-MNIST": "fashion_mnist"}
FRACTIONS = {"1 %": 0.01, "5 %": 0.05, "10 %": 0.1, "100 %": 1.0}
LONG_AT = "10 %"
LAYER_EVALS = {PRETRAINING: 1_600_000, TUNED: 240_000}  # of a run
BATCH = {PRETRAINING: 128, TUNED: 64}

COMMON: dict[str, Any] = {
    "flip": True,
    "crop_padding": 2,
    "batch_size": BATCH[TUNED],
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.05,
    "decay": "cosine",
    "label_smoothing": 0.1,
    "ema": 0.0,
    "precision": "bf16",
    "clip": 1.0,
    "validation_fraction": 0.1,
    "validations": 3,
}
SHAPE: dict[str, Any] = {"patch_size": 8, "embedding": "convolutions", "width": 64, "heads": 2, "mlp": 256}
SHAPE |= {"image_size": 32, "channels": 3, "dropout": 0.0, "rand_augment": None}
SCRATCHES: dict[str, tuple[str, dict[str, Any]]] = {
    BRANCHES: ("cifar100_paraformer", {**COMMON, **SHAPE, **schedules.STAGEWISE, "branches": 4, "depth": 2}),
    SERIAL: ("cifar100_vit", {**COMMON, **SHAPE, "schedule": "joint", "depth": 8}),
}
TUNING: dict[str, Any] = {**COMMON, "schedule": "joint", "learning_rate": 1e-3, "head_rate": 3.0}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each fraction whether pretraining helps, and whether branches or a serial stack end better; then what the
    compute of pretraining is worth without it."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        found.setdefault((record["group"], record["label"]), []).append(measured(record, "accuracy")[-1])
    before = [f"{show('accuracy', found[PRETRAINING, kind])} % ({kind})" for kind in SCRATCHES]
    texts = [f"Accuracy on CIFAR-100 after pretraining: {', '.join(before)}."]
    for name in SETS:
        for fraction in FRACTIONS:
            group = _group(name, fraction)
            texts.append(f"{group}: {_gains(group, found)} {_better(group, found)}")
    for name in SETS:
        group = _group(name, LONG_AT)
        texts.append(f"{group}, the compute of pretraining and fine-tuning spent from scratch: {_long(group, found)}")
    return texts


_Found = dict[tuple[str, str], list[float]]


def _gains(group: str, found: _Found) -> str:
    parts = []
    for kind in SCRATCHES:
        tuned, scratch = found[group, _label(kind, TUNED)], found[group, _label(kind, SCRATCH)]
        verdict = _verdict(tuned, scratch, "pretraining helps", "pretraining harms", "no difference that seeds allow")
        parts.append(f"{kind} {show('accuracy', tuned)} %, from scratch {show('accuracy', scratch)} %: {verdict}")
    return "; ".join(parts) + "."


def _better(group: str, found: _Found) -> str:
    branches, serial = (found[group, _label(kind, TUNED)] for kind in (BRANCHES, SERIAL))
    verdict = _verdict(branches, serial, "Branches transfer better", "The serial stack transfers better", "")
    gains = [
        100 * (mean(found[group, _label(kind, TUNED)]) - mean(found[group, _label(kind, SCRATCH)]))
        for kind in (BRANCHES, SERIAL)
    ]
    difference = 100 * abs(mean(branches) - mean(serial))
    text = f"{verdict}, by {difference:.2f} points" if verdict else f"{difference:.2f} points apart, within the spread"
    return f"{text}; gained over training from scratch {gains[0]:+.2f} (branches) and {gains[1]:+.2f} (serial)."


def _long(group: str, found: _Found) -> str:
    parts = []
    for kind in SCRATCHES:
        tuned, long = found[group, _label(kind, TUNED)], found[group, _label(kind, LONG)]
        verdict = _verdict(tuned, long, "pretraining is worth it", "pretraining is not worth it", "no telling")
        parts.append(f"{kind} {show('accuracy', long)} %, fine-tuned {show('accuracy', tuned)} %: {verdict}")
    return "; ".join(parts) + "."


def _verdict(ours: list[float], theirs: list[float], more: str, less: str, same: str) -> str:
    gain = mean(ours) - mean(theirs)
    return same if abs(gain) <= doubt(ours, theirs) else more if gain > 0 else less


def _group(name: str, fraction: str) -> str:
    return f"{fraction} of {name}"


def _label(kind: str, how: str) -> str:
    return f"{kind}, {how}"


def _budget(layer_evals: int) -> str:
    return f"{layer_evals} layer_evals"


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Branches and a serial stack, pretrained and not, on four fractions of two data sets."""
    slugs = {BRANCHES: "pf", SERIAL: "serial"}
    sources: dict[str, list[Cell]] = {}
    for kind, (recipe, options) in SCRATCHES.items():
        chosen = {**options, "data": "cifar100", "batch_size": BATCH[PRETRAINING]}
        chosen["budget"] = _budget(LAYER_EVALS[PRETRAINING])
        sources[kind] = [Cell(f"pretraining-{slugs[kind]}-{s}", PRETRAINING, kind, recipe, chosen, s) for s in seeds]
    cells = [cell for of_kind in sources.values() for cell in of_kind]
    for name, data in SETS.items():
        for fraction, part in FRACTIONS.items():
            group, slug = _group(name, fraction), f"{data}-{fraction.split()[0]}"
            own = {"train_fraction": part, "budget": _budget(LAYER_EVALS[TUNED])}
            for kind, (recipe, options) in SCRATCHES.items():
                label, start = _label(kind, TUNED), f"{slug}-{slugs[kind]}"
                for source in sources[kind]:
                    cell = Cell(f"{start}-tuned-{source.seed}", group, label, data, {**TUNING, **own}, source.seed)
                    cells.append(replace(cell, after=source))
                fresh = {**options, **own, "data": data}
                rows = [(SCRATCH, "scratch", fresh)]
                if fraction == LONG_AT:
                    long = {"batch_size": BATCH[PRETRAINING], "budget": _budget(sum(LAYER_EVALS.values()))}
                    rows.append((LONG, "long", {**fresh, **long}))
                for how, word, given in rows:
                    cells += [Cell(f"{start}-{word}-{s}", group, _label(kind, how), recipe, given, s) for s in seeds]
    return Study(
        name="transfer",
        title="Pretraining on CIFAR-100, fine-tuning on fractions of CIFAR-10 and Fashion-MNIST",
        question="Does pretraining on a large set help with a small one, and do branches or a serial stack transfer "
        "better?",
        cells=tuple(cells),
        findings=findings,
        notes=_notes(),
    )


def _notes() -> dict[str, str]:
    """A remark for each group."""
    batches = {what: f"{evals // (8 * BATCH[what]):,} batches of {BATCH[what]}" for what, evals in LAYER_EVALS.items()}
    stagewise = "branches are trained stagewise, in more batches through fewer layers"
    notes = {PRETRAINING: f"45,000 images of 100 classes, {batches[PRETRAINING]} through 8 layers; {stagewise}."}
    for name in SETS:
        for fraction in FRACTIONS:
            notes[_group(name, fraction)] = (
                f"{batches[TUNED]} through 8 layers; from scratch, {stagewise}. The fine-tuned models have seen "
                "CIFAR-100 besides."
            )
    return notes
