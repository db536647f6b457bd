"""Does training on many images help with few of another kind, and do branches or a serial stack transfer better?

The protocol of Para-Former (Dynamic Universal Approximation Theory, arXiv 2407.21670): train on a large set, fine-tune
on a small one. Here CIFAR-100, then 1, 5, 10 and 100 % of CIFAR-10 (the same kind of images, other classes) and of
Fashion-MNIST (another kind; grey values are repeated, 28 pixels become 32). 8 layers of width 64: 4 branches of 2, or
a serial stack. Every fine-tuned model stands beside the same network trained from scratch on the same images for the
same number of layer evaluations, and, at one fraction, for as many as pretraining and fine-tuning took together.

At size "paper", whose sets and sizes are not stated, ViT-Tiny's width and the budgets of the recipes.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.claim import DUAT, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, answer, compare, show
from paradepth.studies.study import Cell, Size, Study

HELPS, BETTER, SCALING = "fine-tuning-transfer", "branches-transfer-better", "scaling-over-data"
CLAIMS = (
    Claim(HELPS, "Branches that were trained on a large set can be fine-tuned on a small one.", DUAT),
    Claim(BETTER, "Do branches transfer better than a serial stack?", DUAT, "question"),
    Claim(SCALING, "Do branches beat a serial stack whatever the size of the data set?", DUAT, "question"),
)
PROTOCOL = (
    "Branches and a serial stack of equal parameters, trained on CIFAR-100 with equal compute, then fine-tuned on "
    "parts of other sets. Beside each stands the same network trained from scratch on the same images, with the "
    "compute of fine-tuning (and, at one part, also that of pretraining). A difference counts where it exceeds two "
    "standard errors over the seeds."
)
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
    found = _found(records)
    before = [f"{show('accuracy', found[PRETRAINING, kind])} % ({kind})" for kind in SCRATCHES]
    texts = [f"Accuracy on CIFAR-100 after pretraining: {', '.join(before)}."]
    for group in _tuned_groups(found):
        texts.append(f"{group}: {_gains(group, found)} {_better(group, found)}")
    for group in _tuned_groups(found):
        if (group, _label(BRANCHES, LONG)) in found:
            texts.append(
                f"{group}, the compute of pretraining and fine-tuning spent from scratch: {_long(group, found)}"
            )
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Fine-tuned branches against branches from scratch, and branches against a serial stack, both fine-tuned and both
    from scratch: holds where it is better in every group, with conditions where it is in some."""
    found = _found(records)
    groups = _tuned_groups(found)
    said = {}
    for name, what, pair in (
        (HELPS, "Fine-tuned branches against branches from scratch", ((BRANCHES, TUNED), (BRANCHES, SCRATCH))),
        (BETTER, "Fine-tuned branches against a fine-tuned serial stack", ((BRANCHES, TUNED), (SERIAL, TUNED))),
        (SCALING, "Branches against a serial stack, both from scratch", ((BRANCHES, SCRATCH), (SERIAL, SCRATCH))),
    ):
        rows = {group: [found[group, _label(*row)] for row in pair] for group in groups}
        results = [compare(*both) for both in rows.values()]
        shown = ", ".join(f"{group} {100 * (mean(a) - mean(b)):+.2f}" for group, (a, b) in rows.items())
        better, worse = (results.count(result) for result in (Compared.BETTER, Compared.WORSE))
        figure = f"{what}, points of accuracy: {shown}. Better in {better}, worse in {worse} of {len(groups)} groups."
        said[name] = Verdict(answer([result == Compared.BETTER for result in results]), figure)
    return said


_Found = dict[tuple[str, str], list[float]]


def _found(records: list[dict[str, Any]]) -> _Found:
    return {
        (group, label): last(of, "accuracy") for group, rows in by_row(records).items() for label, of in rows.items()
    }


def _tuned_groups(found: _Found) -> list[str]:
    return [group for group in dict.fromkeys(group for group, _ in found) if group != PRETRAINING]


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
    return {Compared.BETTER: more, Compared.WORSE: less, Compared.SAME: same}[compare(ours, theirs)]


def _group(name: str, fraction: str) -> str:
    return f"{fraction} of {name}"


def _label(kind: str, how: str) -> str:
    return f"{kind}, {how}"


def _budget(layer_evals: int) -> str:
    return f"{layer_evals} layer_evals"


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """Branches and a serial stack, pretrained and not, on four fractions of two data sets."""
    slugs = {BRANCHES: "pf", SERIAL: "serial"}
    sets, fractions, scratches, tuning = SETS, FRACTIONS, SCRATCHES, TUNING
    evals, batch = LAYER_EVALS, BATCH
    if size == "smoke":
        small = {"width": 8, "heads": 2, "mlp": 16, "precision": "float32", "validations": 1}
        scratches = {kind: (recipe, {**given, **small}) for kind, (recipe, given) in SCRATCHES.items()}
        sets, fractions, seeds = {"Fashion-MNIST": "fashion_mnist"}, {LONG_AT: 0.1}, seeds[:1]
        tuning = {**TUNING, "precision": "float32", "validations": 1}
        evals, batch = {PRETRAINING: 512, TUNED: 256}, {PRETRAINING: 8, TUNED: 8}
    elif size == "paper":
        large = {"patch_size": 4, "width": 192, "heads": 3, "mlp": 768}
        scratches = {kind: (recipe, {**given, **large}) for kind, (recipe, given) in SCRATCHES.items()}
        evals = {PRETRAINING: 100 * 45_000 * 8, TUNED: 10 * 45_000 * 8}
    sources: dict[str, list[Cell]] = {}
    for kind, (recipe, options) in scratches.items():
        chosen = {**options, "data": "cifar100", "batch_size": batch[PRETRAINING]}
        chosen["budget"] = _budget(evals[PRETRAINING])
        sources[kind] = [Cell(f"pretraining-{slugs[kind]}-{s}", PRETRAINING, kind, recipe, chosen, s) for s in seeds]
    cells = [cell for of_kind in sources.values() for cell in of_kind]
    for name, data in sets.items():
        for fraction, part in fractions.items():
            group, slug = _group(name, fraction), f"{data}-{fraction.split()[0]}"
            own = {"train_fraction": part, "budget": _budget(evals[TUNED])}
            if batch[TUNED] != BATCH[TUNED]:
                own["batch_size"] = batch[TUNED]
            for kind, (recipe, options) in scratches.items():
                label, start = _label(kind, TUNED), f"{slug}-{slugs[kind]}"
                for cell in sources[kind]:
                    tuned = Cell(f"{start}-tuned-{cell.seed}", group, label, data, {**tuning, **own}, cell.seed)
                    cells.append(replace(tuned, after=cell))
                fresh = {**options, **own, "data": data}
                rows = [(SCRATCH, "scratch", fresh)]
                if fraction == LONG_AT:
                    long = {"batch_size": batch[PRETRAINING], "budget": _budget(sum(evals.values()))}
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
        notes=_notes() if size == "here" else {},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
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
