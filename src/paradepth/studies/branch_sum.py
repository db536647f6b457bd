"""Can a trained serial stack be turned into branches?

How far a stack is from its own branch sum x + h Σ F_i(x), for intervals of every length, before and after training,
beside the first guess that MGRIT's coarse operator `branch` makes with these intervals. Then the stack's layers as
branches of consecutive layers: right after conversion, and after training them further for a part of the stack's own
budget, with and without the stack as the teacher; beside the stack trained on for as long, and the same branches
trained from scratch with the whole budget. Last a pretrained encoder of sentences, MiniLM, by its embeddings.

Every model of a data set has the same parameters and the same layers. A distillation's teacher costs a third of its
updates' layer evaluations besides, which the fractions do not count and the column of layer evaluations does.
"""

from __future__ import annotations

from typing import Any

from paradepth.studies._branch_sum_findings import CLAIMS, FACTOR, findings, limits, verdicts
from paradepth.studies._branch_sum_grid import (
    AT_ONCE,
    DISTANCE,
    MINILM,
    MINILM_DISTANCE,
    ON,
    SERIAL,
    SIZES,
    Scale,
    Stacks,
    shape,
)
from paradepth.studies.study import Cell, Curve, Size, Study


def study(size: Size = "here") -> Study:
    """Serial stacks and branches from scratch; distances; conversions, trained further or not; the encoder."""
    scale = SIZES[size]
    cells: list[Cell] = []
    for chosen in scale.sets:
        for seed in scale.seeds:
            cells += _of_stack(chosen, scale, seed)
    for label, own in scale.rows.items():
        slug = "minilm-" + "-".join(label.split())
        options = {**scale.sentences, **own}
        cells += [_measure(f"{slug}-{s}", MINILM, label, "sentence_conversion", options, s) for s in scale.seeds]
    cells += [
        _measure(f"minilm-distance-{s}", MINILM_DISTANCE, "MiniLM", "sentence_distance", scale.encoder, s)
        for s in scale.seeds
    ]
    cells.sort(key=lambda cell: _groups(scale).index(cell.group))
    return Study(
        name="branch_sum",
        title="A serial stack as branches",
        question="How far is a trained serial stack from its own branch sum, and can it be converted to branches by "
        "short fine-tuning?",
        cells=tuple(cells),
        findings=lambda records: findings(records, scale),
        notes=_notes(scale),
        headline={chosen.trained: chosen.key for chosen in scale.sets},
        claims=CLAIMS,
        protocol=_protocol(scale),
        verdicts=lambda records: verdicts(records, scale),
        curves=_curves(scale),
    )


def _of_stack(chosen: Stacks, scale: Scale, seed: int) -> list[Cell]:
    """The cells of one data set and one seed."""
    slug = chosen.slug
    stack = {**chosen.options, "depth": chosen.depth} | ({"branches": 0} if chosen.serial == chosen.parallel else {})
    serial = Cell(f"{slug}-serial-{seed}", chosen.trained, SERIAL, chosen.serial, stack, seed)

    def after(name: str, group: str, label: str, what: str, options: dict[str, Any]) -> Cell:
        return _measure(
            "-".join(f"{slug} {name} {seed}".replace(",", "").split()), group, label, what, options, seed, after=serial
        )

    cells = [serial, after("distance", DISTANCE, chosen.name, "branch_sum", {"samples": scale.samples})]
    for label, options in chosen.at_once.items():
        cells.append(after(f"once {label}", AT_ONCE, f"{chosen.name}, {label}", "conversion", options))
    if not chosen.scratch:
        return cells
    further = {"fractions": list(scale.fractions)}
    cells.append(after("on", chosen.trained_on, ON, "conversion", {"branches": 1, "ways": ["tuned"], **further}))
    for label, options in chosen.rows.items():
        cells.append(after(label, chosen.converted, label, "conversion", {**options, **further}))
    for n in chosen.branches:
        options = {**chosen.options, "branches": n, "depth": chosen.depth // n}
        label = shape(n, chosen.depth)
        cells.append(Cell(f"{slug}-scratch-{n}-{seed}", chosen.trained, label, chosen.parallel, options, seed))
    return cells


def _measure(
    name: str, group: str, label: str, what: str, options: dict[str, Any], seed: int, after: Cell | None = None
) -> Cell:
    return Cell(name, group, label, what, options, seed, after=after, command="measure")


def _groups(scale: Scale) -> list[str]:
    """All groups, in the report's order."""
    own = [group for chosen in scale.sets for group in (chosen.trained, chosen.trained_on, chosen.converted)]
    return [DISTANCE, MINILM_DISTANCE, AT_ONCE, *own, MINILM]


def _notes(scale: Scale) -> dict[str, str]:
    notes = {
        DISTANCE: "Before training and after it, on validation samples; lists over interval lengths, means over all "
        "starts. `first_guess` is the largest error at a C-point with the coarse operator branch, `sampled` with "
        "sample, `predicted` what the errors of single intervals add up to.",
        MINILM_DISTANCE: "Layers normalised at their ends, F(x) = Φ(x) − x with h = 1.",
        AT_ONCE: "Nothing is trained.",
        MINILM: f"Distilled on {scale.sentences.get('unlabelled', 6400):,} unlabelled training sentences of SST-2; "
        "figures on its validation sentences; a linear probe of sentiment learns from others. Rows of fewer layers "
        "have fewer parameters: what is as shallow as a branch without branches.",
    }
    for chosen in scale.sets:
        if chosen.scratch:
            notes[chosen.converted] = (
                "Lists: right after conversion, then after "
                f"{', '.join(f'{100 * f:g}' for f in scale.fractions)} % of the serial stack's updates, each a "
                "training of its own. Layer evaluations are those of all of them."
            )
    return notes


def _curves(scale: Scale) -> dict[str, tuple[Curve, ...]]:
    axis = {"x": "lengths", "x_title": "layers of an interval", "log_x": True}
    curves = {
        DISTANCE: tuple(
            Curve(f"{when}_{what}", **axis)
            for when in ("initial", "trained")
            for what in ("increment", "first_guess", "logits")
        ),
        MINILM_DISTANCE: (Curve("increment", **axis), Curve("first_guess", **axis)),
    }
    spent = {"x": tuple(100 * f for f in (0.0, *scale.fractions)), "x_title": "further training, % of the budget"}
    for chosen in scale.sets:
        if chosen.scratch:
            curves[chosen.converted] = tuple(Curve(f"{way}_{chosen.key}", **spent) for way in ("tuned", "distilled"))
    return curves


def _protocol(scale: Scale) -> str:
    sets = "; ".join(f"{chosen.name}, {chosen.depth} layers" for chosen in scale.sets)
    return (
        f"Serial stacks are trained ({sets}), then measured on validation samples and converted: consecutive layers "
        f"make a branch, contributions are added up. Converted models are trained on for "
        f"{', '.join(f'{100 * f:g}' for f in scale.fractions)} % of the stack's own updates with half its rate, on the "
        "targets alone (tuned) or towards the stack as well (distilled). Branches from scratch have the same "
        "parameters and the whole budget, trained jointly. A claim of no loss fails where branches are worse by more "
        "than two standard errors; a stack counts as converted where distillation comes within "
        f"{limits()} by the last fraction; a prediction counts where it is right to a factor of {FACTOR:g}. MiniLM is "
        "converted in the same way and distilled on sentences without labels."
    )
