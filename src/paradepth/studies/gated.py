"""Do gates that depend on the input help, and which branches does a sample need?

The plain sum x + Σ δ_i(x) against x + Σ α_i(x) δ_i(x) with a gate of 65 numbers for each branch, at equal layer
evaluations; a gate adds 0.1 % of a branch's parameters. The gates are free, or pay for being open: the mean gate times
a penalty is added to the loss. Then branches are left out: for each sample those whose gate is below a threshold, or
the same branches for all samples; what is left out is chosen on the validation split (measurement `routing`).

At size "here" a run takes one to two minutes of one core, a measurement 12 seconds, and the 72 cells 35 minutes of two.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.studies.claim import DUAT, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, answer, compare, doubt, one_seed, show
from paradepth.studies.study import Cell, Curve, Size, Study

PLAIN, GATED = "plain sum", "gated"
LEFT_OUT = ", branches left out"  # behind the name of a task: its measurements
LOSS = 0.005  # of accuracy, that leaving out branches may cost
LEAST_SAVED = 0.1  # part of the layer evaluations
DEPENDENT, CONDITIONAL = "input-dependent-coefficients", "conditional-compute"
CLAIMS = (
    Claim(
        DEPENDENT,
        "Coefficients α_j(x) that depend on the input make a sum of branches a better approximator than a plain sum.",
        DUAT,
    ),
    Claim(
        CONDITIONAL,
        "Can branches whose α_j(x) is small be left out for that sample, at less loss than leaving out as many for all "
        "samples alike?",
        DUAT,
        "question",
    ),
)

IMAGES: dict[str, Any] = {
    "embedding": "convolutions",
    "flip": True,
    "crop_padding": 2,
    "batch_size": 64,
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.05,
    "decay": "cosine",
    "label_smoothing": 0.0,
    "ema": 0.0,
    "precision": "bf16",
    "schedule": "joint",
    "prefix_losses": False,
    "validations": 3,
}
TEXT: dict[str, Any] = {
    "context": 64,
    "vocab_size": 1024,
    "dropout": 0.1,
    "batch_size": 32,
    "optimiser": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup": 0.1,
    "decay": "cosine",
    "label_smoothing": 0.0,
    "schedule": "joint",
    "validations": 3,
}
SHAPE: dict[str, Any] = {"branches": 4, "depth": 2, "width": 64, "heads": 2, "mlp": 256}
_DIGITS = {**IMAGES, "embedding": "linear", "flip": False, "crop_padding": 0, "batch_size": 16, "validations": 1}
_DIGITS |= {"patch_size": 4, "branches": 2, "depth": 1, "width": 16, "heads": 2, "mlp": 32, "precision": "float32"}

# For each size the seeds, the penalties, and the tasks: a recipe and its options.
SIZES: dict[Size, dict[str, Any]] = {
    "smoke": {
        "seeds": (0,),
        "penalties": (0.3,),
        "tasks": {"digits": ("digits_paraformer", _DIGITS | {"budget": "768 layer_evals"})},
    },
    "here": {
        "seeds": (0, 1, 2),
        "penalties": (0.03, 0.1),
        "tasks": {
            "Fashion-MNIST": (
                "fashion_paraformer",
                {**IMAGES, **SHAPE, "embedding": "linear", "patch_size": 7, "budget": "600000 layer_evals"},
            ),
            "CIFAR-10": (
                "cifar10_paraformer",
                {
                    **IMAGES,
                    **SHAPE,
                    "model": "paraformer_nano",
                    "rand_augment": None,
                    "patch_size": 8,
                    "budget": "600000 layer_evals",
                },
            ),
            "SST-2": (
                "glue_from_scratch",
                {**TEXT, **SHAPE, "validation_fraction": 0.05, "budget": "204800 layer_evals"},
            ),
        },
    },
    "paper": {
        "seeds": (0, 1, 2),
        "penalties": (0.03, 0.1, 0.3),
        "tasks": {
            "CIFAR-10": ("cifar10_paraformer", {"schedule": "joint", "depth": 6}),
            "CIFAR-100": ("cifar100_paraformer", {"schedule": "joint", "depth": 6}),
            "SST-2": (
                "glue_from_scratch",
                {"model": "text_classifier_mini", "branches": 4, "depth": 6, "schedule": "joint", "context": 128},
            ),
        },
    },
}
_Found = dict[str, dict[str, list[dict[str, Any]]]]  # group → label → records by seed


def label(penalty: float) -> str:
    """Row of a gated model."""
    return f"{GATED}, penalty {penalty:g}" if penalty else GATED


def findings(records: list[dict[str, Any]]) -> list[str]:
    """For each task accuracy and calibration of all rows; then what is lost and saved by leaving out branches."""
    found, texts = by_row(records), []
    for task in _tasks(found):
        rows = found[task]
        accuracy = "; ".join(f"{row} {show('accuracy', last(of, 'accuracy'))}" for row, of in rows.items())
        error = "; ".join(f"{row} {show('accuracy', last(of, 'calibration_error'))}" for row, of in rows.items())
        texts.append(f"{task}, test accuracy in %: {accuracy}. Expected calibration error in %: {error}.")
        parts = []
        for row, of in found[task + LEFT_OUT].items():
            if row == PLAIN:
                continue
            spread, constant, full = (mean(last(of, key)) for key in ("gate_spread", "constant", "full"))
            parts.append(
                f"{row}: gates {mean(last(of, 'gate')):.2f} on average, deviating by {spread:.3f} between samples "
                f"(with every gate at its mean {100 * (constant - full):+.2f} points); {_routed(of)}"
            )
        texts.append(f"{task}, {'. '.join(parts)}.")
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """By differences of means, against two standard errors."""
    found = by_row(records)
    if any(len(of) < 2 for rows in found.values() for of in rows.values()):
        return one_seed(CLAIMS)
    return {DEPENDENT: _dependent(found), CONDITIONAL: _conditional(found)}


def _dependent(found: _Found) -> Verdict:
    """Free gates against the plain sum: better by more than the doubt in every task, in some, in none. A task where
    they are worse by more than that is a condition as well."""
    better, shown = [], []
    for task in _tasks(found):
        ours, theirs = (last(found[task][row], "accuracy") for row in (GATED, PLAIN))
        better.append(compare(ours, theirs) == Compared.BETTER)
        constant = found[task + LEFT_OUT][GATED]
        lost = mean(last(constant, "full")) - mean(last(constant, "constant"))
        errors = [mean(last(found[task][row], "calibration_error")) for row in (GATED, PLAIN)]
        shown.append(
            f"{task} {100 * (mean(ours) - mean(theirs)):+.2f} points (doubt {100 * doubt(ours, theirs):.2f}), "
            f"calibration error {100 * errors[0]:.2f} against {100 * errors[1]:.2f} %, {100 * lost:+.2f} points due to "
            "the gates' dependence on the input"
        )
    return Verdict(answer(better), f"Gates against the plain sum: {'; '.join(shown)}.")


def _conditional(found: _Found) -> Verdict:
    """Of each task's gated row that saves most: it must save a tenth of the layer evaluations, lose at most half a
    point, and be better than the subset that saves as much by more than the doubt; in every task, or some."""
    good, shown = [], []
    for task in _tasks(found):
        rows = {row: of for row, of in found[task + LEFT_OUT].items() if row != PLAIN}
        within = {
            row: of for row, of in rows.items() if mean(last(of, "full")) - mean(last(of, "routed")) <= LOSS
        } or rows
        row = max(within, key=lambda row: mean(last(within[row], "saved")))
        of = within[row]
        routed, fixed = last(of, "routed"), last(of, "fixed")
        lost, saved = mean(last(of, "full")) - mean(routed), mean(last(of, "saved"))
        good.append(saved >= LEAST_SAVED and lost <= LOSS and mean(routed) - mean(fixed) > doubt(routed, fixed))
        shown.append(f"{task}, {row}: {_routed(of)}")
    return Verdict(answer(good), f"{'; '.join(shown)}.")


def _routed(of: list[dict[str, Any]]) -> str:
    """What the threshold chosen on validation saves and loses."""
    full, routed, fixed, saved = (last(of, key) for key in ("full", "routed", "fixed", "saved"))
    lost, lost_fixed = (100 * (mean(values) - mean(full)) for values in (routed, fixed))
    return (
        f"{100 * mean(saved):.1f} % of the layer evaluations saved for {lost:+.2f} points, branches left out for all "
        f"samples {lost_fixed:+.2f}"
    )


def _tasks(found: _Found) -> list[str]:
    return [group for group in found if not group.endswith(LEFT_OUT)]


def study(size: Size = "here", *, seeds: tuple[int, ...] | None = None) -> Study:
    """The plain sum, free gates and gates that pay for being open, on images and texts; then branches left out."""
    chosen = SIZES[size]
    runs: list[Cell] = []
    measurements: list[Cell] = []
    for task, (recipe, options) in chosen["tasks"].items():
        rows: dict[str, dict[str, Any]] = {PLAIN: {"aggregate": "residual"}, GATED: {"aggregate": "gated"}}
        rows |= {label(p): {"aggregate": "gated", "gate_penalty": p} for p in chosen["penalties"]}
        for row, own in rows.items():
            slug = f"{task}-{row}".lower().replace(", penalty ", "-").replace(" ", "-")
            for seed in chosen["seeds"] if seeds is None else seeds:
                run = Cell(f"{slug}-{seed}", task, row, recipe, {**options, **own}, seed)
                runs.append(run)
                measurements.append(
                    Cell(f"{run.name}-routing", task + LEFT_OUT, row, "routing", {}, seed, after=run, command="measure")
                )
    drawn = Curve("parts_accuracy", "parts_saved", "part of the layer evaluations saved", "accuracy")
    return Study(
        name="gated",
        title="Gates that depend on the input, and branches that a sample does without",
        question="Is a sum of branches with coefficients α_i(x) better than the plain sum at equal compute, and can "
        "branches be left out where α_i(x) is small?",
        cells=(*runs, *measurements),
        findings=findings,
        notes={
            task
            + LEFT_OUT: "Gated models leave out branches by sample, the plain sum the same ones for all. Thresholds "
            "and subsets are chosen on the validation split, figures are of the test split."
            for task in chosen["tasks"]
        },
        curves={task + LEFT_OUT: (drawn,) for task in chosen["tasks"]},
        claims=CLAIMS,
        verdicts=verdicts,
        protocol="Four branches of two layers, trained jointly on the same batches with the same options; a gate is "
        "1 + tanh(w · mean of LN(x) / √D + b), so that all rows start from the same function. Penalised gates pay "
        "their mean times the penalty. A threshold is the largest one of eight quantiles of the validation gates that "
        f"loses at most {100 * LOSS:g} points of validation accuracy; it is held against the subset of branches that "
        "is best on the validation split, interpolated to the same saving. A difference counts when it exceeds two "
        "standard errors.",
    )
