"""What do layers lose that share their weights?

Four branches of two layers whose layers share nothing, whole layers across branches, whole layers across the depth of a
branch, attention parts only, or MLP parts only; and serial stacks of eight layers that share nothing or one layer. All
spend the same layer evaluations. First at the same width, where sharing means fewer parameters; then widened until the
trunk has as many as the one that shares nothing, which makes every layer evaluation dearer: those rows are matched in
parameters and layer evaluations, not in operations.

Branches that share whole layers are copies of one another: on the same input they add the same. That row is one branch,
counted four times, and says what collaboration is worth.

Time is that of a training step on one process, branches one by one or batched against a serial stack, taken by turns
(measurement `sharing`). At size "here" a run takes about a minute of one core (a widened one two), a timing seconds,
and the 63 cells 40 minutes of two.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.studies.claim import DUAT, Claim, Verdict
from paradepth.studies.gated import IMAGES, SHAPE, TEXT
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import answer, doubt, one_seed, show
from paradepth.studies.study import Cell, Size, Study

NONE, SHARES = "none", ("branches", "depth", "attention", "mlp")
WIDENED, TIMES = ", equal parameters", "time of a training step"
ABLATION, EFFICIENCY = "parameter-sharing-ablation", "parameter-sharing-efficiency"
CLAIMS = (
    Claim(
        ABLATION,
        "Do layers need weights of their own: does sharing them, at equal parameters, cost accuracy?",
        DUAT,
        "question",
    ),
    Claim(
        EFFICIENCY,
        "Units that share no parameters can be computed in parallel: does sharing change what parallel branches gain?",
        DUAT,
        "question",
    ),
)
NAMES = {
    NONE: "nothing shared",
    "branches": "layers shared across branches",
    "depth": "layers shared across depth",
    "attention": "attention shared",
    "mlp": "MLP shared",
}
SERIAL = "serial, "
CHANGE = 0.1  # of a speed-up, that counts
# Shapes of trunks that share and have as many parameters as one of width 64 that does not, within 2 %.
WIDER: dict[str, dict[str, int]] = {
    "branches": {"width": 128, "heads": 4, "mlp": 512},
    "depth": {"width": 90, "heads": 3, "mlp": 360},
    "attention": {"width": 76, "heads": 2, "mlp": 304},
    "mlp": {"width": 99, "heads": 3, "mlp": 396},
}
_DIGITS: dict[str, Any] = {**IMAGES, "embedding": "linear", "flip": False, "crop_padding": 0, "batch_size": 16}
_DIGITS |= {"patch_size": 4, "width": 8, "heads": 2, "mlp": 16, "precision": "float32", "validations": 1}
_SMALL = {"branches": 2, "depth": 2}
_TIMED: dict[str, Any] = {**SHAPE, "tokens": 16, "batch": 64, "rounds": 30}
_IMAGES = {**IMAGES, "embedding": "linear", "patch_size": 7, "budget": "400000 layer_evals"}
_TEXT = {**TEXT, "validation_fraction": 0.05, "budget": "204800 layer_evals"}

# For each size the seeds; the tasks, each a recipe for branches, one for a serial stack or None, and options; shapes of
# equal parameters, by task; the ways to share; and what is timed.
SIZES: dict[Size, dict[str, Any]] = {
    "smoke": {
        "seeds": (0,),
        "shape": _SMALL,
        "tasks": {"digits": ("digits_paraformer", None, _DIGITS | {"budget": "512 layer_evals"})},
        "wider": {},
        "shares": ("attention",),
        "timed": {**_SMALL, "width": 8, "heads": 2, "mlp": 16, "tokens": 4, "batch": 2, "rounds": 2},
    },
    "here": {
        "seeds": (0, 1, 2),
        "shape": SHAPE,
        "tasks": {
            "Fashion-MNIST": ("fashion_paraformer", "fashion_vit", _IMAGES),
            "SST-2": ("glue_from_scratch", None, _TEXT),
        },
        "wider": {"Fashion-MNIST": WIDER},
        "shares": SHARES,
        "timed": _TIMED,
    },
    "paper": {
        "seeds": (0, 1, 2),
        "shape": {"branches": 4, "depth": 6},
        "tasks": {"CIFAR-10": ("cifar10_paraformer", "cifar10_vit", {"schedule": "joint"})},
        "wider": {
            "CIFAR-10": {
                "branches": {"width": 384, "heads": 6, "mlp": 1536},
                "depth": {"width": 468, "heads": 6, "mlp": 1872},
                "attention": {"width": 232, "heads": 4, "mlp": 928},
                "mlp": {"width": 320, "heads": 5, "mlp": 1280},
            }
        },
        "shares": SHARES,
        "timed": {"branches": 4, "depth": 6, "width": 192, "heads": 3, "mlp": 768, "tokens": 64, "batch": 128},
    },
}
_Found = dict[str, dict[str, list[dict[str, Any]]]]  # group → label → records by seed


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task accuracy and parameters of every way to share; then times."""
    found, texts = by_row(records), []
    for group, rows in found.items():
        if group == TIMES:
            texts.append(_times(rows))
            continue
        shown = (
            f"{row} {show('accuracy', last(of, 'accuracy'))} ({mean(r['parameters'] for r in of):,.0f})"
            for row, of in rows.items()
        )
        texts.append(f"{group}, test accuracy in % (parameters): {'; '.join(shown)}.")
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """By differences of means, against two standard errors."""
    found = by_row(records)
    if any(len(of) < 2 for rows in found.values() for of in rows.values()):
        return one_seed(CLAIMS)
    return {ABLATION: _ablation(found), EFFICIENCY: _efficiency(found)}


def _ablation(found: _Found) -> Verdict:
    """Every way to share at equal parameters against nothing shared: it costs where accuracy falls by more than the
    doubt. Holds where every way costs, with conditions where some do."""
    costs, shown = [], []
    for group in [group for group in found if group.endswith(WIDENED)]:
        task = group.removesuffix(WIDENED)
        for row, of in found[group].items():
            ours, theirs = last(of, "accuracy"), last(found[task][NAMES[NONE]], "accuracy")
            same = last(found[task][row], "accuracy")
            gain = mean(ours) - mean(theirs)
            costs.append(-gain > doubt(ours, theirs))
            shown.append(
                f"{row} {100 * gain:+.2f} points (doubt {100 * doubt(ours, theirs):.2f}; at equal width "
                f"{100 * (mean(same) - mean(theirs)):+.2f})"
            )
    return Verdict(
        answer(costs), f"At equal parameters and layer evaluations, against nothing shared: {'; '.join(shown)}."
    )


def _efficiency(found: _Found) -> Verdict:
    """The speed-up of batched branches against a serial stack, of every way to share against that of nothing shared: it
    changes where it differs by a tenth and by more than the doubt. Holds where that is so for all, with conditions
    where for some."""
    rows = found[TIMES]
    changed, base = [], last(rows[NAMES[NONE]], "batched_speedup")
    for row, of in rows.items():
        if row != NAMES[NONE]:
            ours = last(of, "batched_speedup")
            gap = abs(mean(ours) - mean(base))
            changed.append(gap > CHANGE * mean(base) and gap > doubt(ours, base))
    return Verdict(answer(changed), _times(rows))


def _times(rows: dict[str, list[dict[str, Any]]]) -> str:
    return f"A training step on one process: {'; '.join(f'{row}: {_time(of)}' for row, of in rows.items())}."


def _time(of: list[dict[str, Any]]) -> str:
    loop, batched = (mean(last(of, f"{way}_speedup")) for way in ("loop", "batched"))
    chain, serial = (mean(last(of, key)) for key in ("chain", "serial_chain"))
    return (
        f"{loop:.2f} times as fast as the serial stack one by one and {batched:.2f} batched, {chain:.0f} layer "
        f"evaluations in a row against {serial:.0f}"
    )


def study(size: Size = "here", *, seeds: tuple[int, ...] | None = None) -> Study:
    """Ways to share weights between layers: at equal width, at equal parameters, and timed."""
    chosen = SIZES[size]
    shape, cells, notes = chosen["shape"], [], {}

    def add(group: str, row: str, recipe: str, options: dict[str, Any], *, timed: bool = False) -> None:
        slug = f"{group} {row}".lower().replace(",", "").replace(" ", "-")
        for seed in chosen["seeds"] if seeds is None else seeds:
            cells.append(
                Cell(f"{slug}-{seed}", group, row, recipe, options, seed, command="measure" if timed else "train")
            )

    for task, (recipe, serial, options) in chosen["tasks"].items():
        for share in (NONE, *chosen["shares"]):
            add(task, NAMES[share], recipe, {**options, **shape, "share": share})
        if serial is not None:
            stack = {**shape, "branches": 0, "depth": shape["branches"] * shape["depth"]}
            for share in (NONE, "depth"):
                add(task, SERIAL + NAMES[share], serial, {**options, **stack, "share": share})
        for share, wider in chosen["wider"].get(task, {}).items():
            add(task + WIDENED, NAMES[share], recipe, {**options, **shape, **wider, "share": share})
            notes[task + WIDENED] = (
                "Trunks that share, widened until they have as many parameters as the one of the table above that "
                "shares nothing. Their layer evaluations are dearer: not matched in operations."
            )
    for share in (NONE, *chosen["shares"]):
        add(TIMES, NAMES[share], "sharing", {**chosen["timed"], "share": share}, timed=True)
    notes[TIMES] = "One process, ways by turns. A serial stack shares in the same way, but for sharing across branches."
    return Study(
        name="sharing",
        title="Layers that share their weights",
        question="What do branches lose in accuracy, and what do they gain in size and time, when layers share "
        "weights: across branches, across depth, attention only, MLP only?",
        cells=tuple(cells),
        findings=findings,
        notes=notes,
        claims=CLAIMS,
        verdicts=verdicts,
        protocol=f"{shape['branches']} branches of {shape['depth']} layers, trained jointly on the same batches with "
        "the same options and layer evaluations; parameters that are shared count once. At equal width, then widened "
        "until the trunk has as many parameters. A difference of accuracy counts when it exceeds two standard errors, "
        f"one of time when it exceeds {100 * CHANGE:g} % as well.",
    )
