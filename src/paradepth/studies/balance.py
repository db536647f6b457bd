"""Few deep branches or many shallow ones?

All ways to cut 12 layers into branches of equal depth, 1×12 (the serial stack) to 12×1, on images and on text: equal
parameters and equal layer evaluations for every shape, in the order of learning that the library recommends (stagewise)
and, on images, jointly as well. Then 4 branches of other depths at the same layer evaluations, where parameters grow
with depth. Of a device for each branch a shape's latency is its depth, counted in layers; it is not timed here.

At size "here" a cell takes about a minute of one core: of images 58 seconds by the speed of a shorter run (6,900 layer
evaluations a second), of text the 60 to 100 seconds of the same budget in the study `tasks`. All 69 cells take some 38
minutes of two cores.
"""

from __future__ import annotations

from itertools import pairwise
from math import log
from statistics import mean
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.claim import PARAFORMER, Answer, Claim, Verdict
from paradepth.studies.record import measured
from paradepth.studies.rules import Compared, answer, compare, one_seed, show
from paradepth.studies.study import Cell, Size, Study
from paradepth.studies.tasks import COMMON as TEXT
from paradepth.studies.tasks import TASKS

STAGEWISE, JOINT, DEPTHS = "stagewise", "joint", "4 branches of other depths"
BALANCED, SHALLOW = "balanced-shapes-win", "least-latency-costs-accuracy"
CLAIMS = (
    Claim(
        BALANCED,
        "Balanced shapes, such as 4 branches of 6 layers, are better than extreme ones of as many layers.",
        PARAFORMER,
    ),
    Claim(
        SHALLOW,
        "Does the shape of least latency, every branch one layer deep, lose accuracy against the best shape of as many "
        "layers?",
        PARAFORMER,
        "question",
    ),
)

IMAGES: dict[str, Any] = {
    "model": "paraformer_nano",
    "patch_size": 8,
    "embedding": "convolutions",
    "flip": True,
    "crop_padding": 2,
    "batch_size": 64,
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.05,
    "decay": "cosine",
    "label_smoothing": 0.1,
    "ema": 0.0,
    "precision": "bf16",
    "validations": 2,
}
_TINY: dict[str, Any] = {"width": 16, "heads": 2, "mlp": 32, "batch_size": 8, "precision": "float32"}
_TINY |= {"validations": 1, "budget": "64 layer_evals"}
_SHORT: dict[str, Any] = {"model": "gpt_nano", "context": 16}
_SERIAL: dict[str, Any] = {"step": 1.0, "buffers": [0, 0]}

# For each size the number of layers, the seeds, the orders of learning for each task, and depths of the slice.
# A task is a recipe, its options, and the measure that rows are compared by.
SIZES: dict[Size, dict[str, Any]] = {
    "smoke": {
        "layers": 4,
        "seeds": (0,),
        "tasks": {
            "images": ("fashion_paraformer", IMAGES | _TINY, "accuracy"),
            "text": ("shakespeare_gpt", TEXT | _SHORT | _TINY, "loss"),
        },
        "orders": {"images": (STAGEWISE,), "text": (STAGEWISE,)},
        "depths": (),
    },
    "here": {
        "layers": 12,
        "seeds": (0, 1, 2),
        "tasks": {
            "images": ("fashion_paraformer", IMAGES | {"budget": "256000 layer_evals"}, "accuracy"),
            "text": ("shakespeare_gpt", {**TEXT, **TASKS["causal language model"][1]}, "loss"),
        },
        "orders": {"images": (STAGEWISE, JOINT), "text": (STAGEWISE,)},
        "depths": (1, 2, 6),
    },
    "paper": {  # 300 passes over CIFAR-10 at 24 layers; the text is the one of layer-parallel training
        "layers": 24,
        "seeds": (0, 1, 2),
        "tasks": {
            "images": ("paraformer_authors_224", {"budget": "3.24e8 layer_evals"}, "accuracy"),
            "text": ("gpt2_openwebtext", {"executor": "serial", "budget": "5.1e8 layer_evals"}, "loss"),
        },
        "orders": {"images": (STAGEWISE, JOINT), "text": (STAGEWISE, JOINT)},
        "depths": (1, 2, 12),
    },
}
_Found = dict[str, dict[tuple[int, int], list[float]]]  # group → shape → measure of every seed


def shapes(layers: int) -> list[tuple[int, int]]:
    """Branches and their depth, for all ways to cut so many layers evenly.

    >>> shapes(12)
    [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    """
    return [(n, layers // n) for n in range(1, layers + 1) if layers % n == 0]


def balanced(layers: int) -> list[tuple[int, int]]:
    """The shapes whose number of branches is nearest to their depth.

    >>> balanced(12), balanced(24)
    ([(3, 4), (4, 3)], [(4, 6), (6, 4)])
    """
    imbalance = {(n, d): abs(log(n / d)) for n, d in shapes(layers)}
    return [shape for shape, value in imbalance.items() if value < min(imbalance.values()) + 1e-9]


def label(shape: tuple[int, int]) -> str:
    """Row of a shape."""
    return f"{shape[0]}×{shape[1]}" + (" (serial)" if shape[0] == 1 else "")


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task and order the measure of every shape, the best one, and which shapes no other beats in both
    latency and measure."""
    found, texts = _by_shape(records), []
    for group, of_shape in found.items():
        key = _key(group)
        shown = "; ".join(f"{label(shape)} {show(key, values)}" for shape, values in of_shape.items())
        best, *others = _order(group, of_shape)
        equal = [shape for shape in others if _told(group, of_shape[shape], of_shape[best]) == Compared.SAME]
        tied = f", not told apart from {', '.join(map(label, equal))} by these seeds" if equal else ""
        texts.append(f"{group[:1].upper()}{group[1:]}, test {key}: {shown}. Best: {label(best)}{tied}.")
        frontier = _frontier(group, of_shape)
        texts.append(
            f"{group[:1].upper()}{group[1:]}, on a device for each branch: "
            + ", ".join(f"latency {d} layer{'s' * (d > 1)} {show(key, of_shape[n, d])} ({n}×{d})" for n, d in frontier)
            + ". No other shape is both shallower and better than these."
        )
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """By differences of means, against two standard errors."""
    found = {group: of_shape for group, of_shape in _by_shape(records).items() if DEPTHS not in group}
    if min(len(values) for of_shape in found.values() for values in of_shape.values()) < 2:
        return one_seed(CLAIMS)
    return {BALANCED: _balanced(found), SHALLOW: _shallow(found)}


def _balanced(found: _Found) -> Verdict:
    """The balanced shapes, taken together, against either extreme. Holds where both are beaten in every table."""
    wins, shown = [], []
    for group, of_shape in found.items():
        layers = max(n for n, _ in of_shape)
        middle = [value for shape in balanced(layers) for value in of_shape[shape]]
        extremes = {shape: of_shape[shape] for shape in ((1, layers), (layers, 1))}
        wins.append([_told(group, middle, values) == Compared.BETTER for values in extremes.values()])
        parts = [f"{_signed(group, middle, values)} {label(shape)}" for shape, values in extremes.items()]
        shown.append(f"{group}: {' and '.join(parts)}")
    all_wins = [win for row in wins for win in row]
    told: Answer = (
        "holds" if all(all_wins) else "holds with conditions" if any(all(row) for row in wins) else "does not hold"
    )
    middle_labels = " and ".join(map(label, balanced(max(n for n, _ in next(iter(found.values()))))))
    return Verdict(told, f"{middle_labels} have, {'; '.join(shown)}.")


def _shallow(found: _Found) -> Verdict:
    """The shape of depth 1 against the best of the others. Holds where it is behind in every table."""
    behind, shown = [], []
    for group, of_shape in found.items():
        shallow = next(shape for shape in of_shape if shape[1] == 1)
        best = next(shape for shape in _order(group, of_shape) if shape != shallow)
        behind.append(_told(group, of_shape[best], of_shape[shallow]) == Compared.BETTER)
        shown.append(f"{group}: {label(best)} has {_signed(group, of_shape[best], of_shape[shallow])} {label(shallow)}")
    return Verdict(answer(behind), f"{'; '.join(shown)}.")


def _key(group: str) -> str:
    return "accuracy" if group.startswith("images") else "loss"


def _told(group: str, ours: list[float], theirs: list[float]) -> Compared:
    return compare(ours, theirs, lower=_key(group) == "loss")


def _gain(group: str, ours: list[float], theirs: list[float]) -> float:
    """Above zero where ours is better."""
    return (mean(ours) - mean(theirs)) * (-1 if _key(group) == "loss" else 1)


def _signed(group: str, ours: list[float], theirs: list[float]) -> str:
    if _key(group) == "accuracy":
        return f"{100 * _gain(group, ours, theirs):+.2f} points against"
    gain = _gain(group, ours, theirs)
    return f"{abs(gain):.4f} {'less' if gain > 0 else 'more'} loss than"


def _order(group: str, of_shape: dict[tuple[int, int], list[float]]) -> list[tuple[int, int]]:
    """Shapes from the best to the worst."""
    return sorted(of_shape, key=lambda shape: mean(of_shape[shape]) * (1 if _key(group) == "loss" else -1))


def _frontier(group: str, of_shape: dict[tuple[int, int], list[float]]) -> list[tuple[int, int]]:
    """From the shallowest on, each shape that is better on average than all shallower ones."""
    kept: list[tuple[int, int]] = []
    for shape in sorted(of_shape, key=lambda shape: shape[1]):
        if not kept or _gain(group, of_shape[shape], of_shape[kept[-1]]) > 0:
            kept.append(shape)
    assert all(a[1] < b[1] for a, b in pairwise(kept))
    return kept


def _by_shape(records: list[dict[str, Any]]) -> _Found:
    found: _Found = {}
    for record in records:
        options = record["options"]
        shape = (options["branches"], options["depth"])
        found.setdefault(record["group"], {}).setdefault(shape, []).append(measured(record, _key(record["group"]))[-1])
    for group in found:  # a serial stack has one order of learning, and is in every table of its task
        serial = [s for other, of in found.items() if _task(other) == _task(group) for s in of.items() if s[0][0] == 1]
        if DEPTHS not in group:
            found[group] = dict(sorted({**dict(serial), **found[group]}.items()))
        else:  # the shape between them stands in the table of stagewise training
            own = found[f"{_task(group)}, {STAGEWISE}"]
            found[group] = dict(sorted({**found[group], **{s: v for s, v in own.items() if s[0] == 4}}.items()))
    return found


def _task(group: str) -> str:
    return group.partition(",")[0]


def study(size: Size = "here", *, seeds: tuple[int, ...] | None = None) -> Study:
    """Shapes of as many layers on images and text, and 4 branches of other depths."""
    chosen = SIZES[size]
    cells: list[Cell] = []
    headline: dict[str, str] = {}
    notes: dict[str, str] = {}

    def add(group: str, shape: tuple[int, int], given: dict[str, Any], recipe: str, name: str) -> None:
        n, d = shape
        order = {"schedule": "joint"} if n == 1 or JOINT in group else schedules.STAGEWISE
        options = {**given, **_SERIAL, **order, "branches": n, "depth": d}
        for seed in chosen["seeds"] if seeds is None else seeds:
            cells.append(Cell(f"{name}-{n}x{d}-{seed}", group, label(shape), recipe, options, seed))

    for task, (recipe, given, key) in chosen["tasks"].items():
        for place, order in enumerate(chosen["orders"][task]):
            group = f"{task}, {order}"
            headline[group] = key
            for shape in shapes(chosen["layers"]):
                if shape[0] > 1 or place == 0:
                    add(group, shape, given, recipe, f"{task}-{order}")
            if place:
                notes[group] = f"The serial stack stands in the table of {task}, {chosen['orders'][task][0]}."
        if chosen["depths"]:
            group = f"{task}, {DEPTHS}"
            headline[group] = key
            notes[group] = f"At the layer evaluations of the shapes above, to which 4×{chosen['layers'] // 4} belongs."
            for d in chosen["depths"]:
                add(group, (4, d), given, recipe, f"{task}-depths")
    return Study(
        name="balance",
        title="Few deep branches or many shallow ones?",
        question=f"Which way to cut {chosen['layers']} layers into branches is the best at equal parameters and "
        "compute, on images and on text, and what does it cost to have the least latency?",
        cells=tuple(cells),
        findings=findings,
        notes=notes,
        headline=headline,
        claims=CLAIMS,
        verdicts=verdicts,
        protocol=f"All ways to cut {chosen['layers']} layers into n branches of depth d, 1×{chosen['layers']} being "
        "the serial stack; a shape's parameters and layer evaluations are those of every other. Learning rate and all "
        "else are the same for all, and were not tuned for any. A difference counts when it exceeds two standard "
        "errors.",
    )
