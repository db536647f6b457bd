"""Layer-parallel training: does the indicator tell when gradients are biased, and what does it take on images?

Images: a serial ViT of 12 layers of width 64 and step 1/12 on Fashion-MNIST, trained serially, and with the published
setting for ViT (forward pass serial, one iteration backward, c = 4, sampled coarse steps), plain and with the
controller. Text: a byte-level language model of 16 layers, trained with one iteration each way that nothing changes;
every 20 batches a probe compares its gradient with the exact one, and at each validation the Lipschitz constants of the
layers are estimated, with and without buffers. Processes: a mesh of 2 × 2 against one process.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.claim import LAYER_PARALLEL, Claim, Verdict
from paradepth.studies.record import by_row, last
from paradepth.studies.rules import Compared, answer, compare, show
from paradepth.studies.study import Cell, Curve, Size, Study
from paradepth.studies.tasks import COMMON, CONTROL

IMAGES, TEXT = "images", "language model, probed"
PROBES, COMPOSITION = "what the probes found", "four processes against one"
SERIAL, PARALLEL, CONTROLLED = "serial", "layer-parallel", "layer-parallel, controller"
PLAIN, BUFFERED = "no buffers", "two buffer layers at each end"
VIT, TELLS, STIFF, DATA = (
    "vit-needs-the-switch",
    "indicator-tells-the-bias",
    "ends-stiffen-first",
    "composition-with-data-parallelism",
)
CLAIMS = (
    Claim(
        VIT, "ViT: layer-parallel training needs the switch to reach the accuracy of serial training.", LAYER_PARALLEL
    ),
    Claim(TELLS, "The convergence factor ρ of a probe tells when gradients become biased.", LAYER_PARALLEL),
    Claim(STIFF, "Lipschitz constants grow first in the first and last layers.", LAYER_PARALLEL),
    Claim(DATA, "Does layer-parallel training compose with data parallelism?", LAYER_PARALLEL, "question"),
)
PROTOCOL = (
    "Rows of a group differ in how the same network is trained, with the same batches and number of steps. Images: "
    "layer-parallel training is worse where it is by two standard errors over the seeds. Probes: Spearman's "
    "correlation of ρ and of 1 − cosine to the exact gradient within a run is to be at least 0.7 with every seed, and "
    "Lipschitz estimates of the first two and last two layers are to grow more than those of the others, in runs "
    "without buffers. Processes: 2 × 2 processes are to end with the weights of one to a thousandth of what training "
    "changes."
)
CORRELATED, EQUAL = 0.7, 1e-3

VIT_OPTIONS: dict[str, Any] = {**schedules.COMMON, "schedule": "joint", "depth": 12, "step": 1 / 12, "buffers": [0, 0]}
VIT_OPTIONS |= {"width": 64, "heads": 2, "mlp": 256, "dropout": 0.0, "budget": "384000 layer_evals"}
PUBLISHED: dict[str, Any] = {"executor": "mgrit", "levels": 2, "coarsening": 4, "relaxation": "F", "coarse": "sample"}
PUBLISHED |= {"forward_iterations": "serial", "backward_iterations": 1, "recompute": False}
GPT: dict[str, Any] = {**COMMON, "model": "gpt_nano", "branches": 0, "depth": 16, "context": 64, "batch_size": 16}
GPT |= {"schedule": "joint", "budget": "51200 layer_evals", **PUBLISHED, "forward_iterations": 1}
# A threshold that no probe reaches: the controller watches only.
GPT |= {"control": True, "probe_every": 20, "rho_threshold": 1e6, "exact_probe": True, "lipschitz": True}
STACKS: dict[str, dict[str, Any]] = {
    PLAIN: {"step": 1 / 16, "buffers": [0, 0]},
    BUFFERED: {"step": 1 / 12, "buffers": [2, 2]},
}
SHARED = {"layers": "layers, 2 × 2", "branches": "branches, 2 × 2"}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """Accuracy on images, what the probes found, and how close four processes are to one."""
    rows = by_row(records)
    images = {label: last(rows[IMAGES][label], "accuracy") for label in (SERIAL, PARALLEL, CONTROLLED)}
    texts = ["Images, accuracy in %: " + "; ".join(f"{k} {show('accuracy', v)}" for k, v in images.items()) + "."]
    for label in STACKS:
        rho, bias, tied = (last(rows[PROBES][label], key) for key in ("last_rho", "last_bias", "rank_correlation"))
        ends, middle = (last(rows[PROBES][label], f"growth_of_{part}") for part in ("ends", "middle"))
        texts.append(
            f"Language model, {label}: at the last probe ρ is {mean(rho):.3f} and the gradient's bias 1 − cosine "
            f"{mean(bias):.4f}; rank correlation of both over the run {mean(tied):.2f}. Lipschitz estimates become "
            f"{mean(ends):.2f} times as large in the two first and two last layers, {mean(middle):.2f} times elsewhere."
        )
    for label, of in rows.get(COMPOSITION, {}).items():
        texts.append(f"{label}: weights differ by {max(last(of, 'difference')):.1e} of what training changes.")
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """By the rules of the protocol."""
    rows = by_row(records)
    serial, plain, controlled = (last(rows[IMAGES][label], "accuracy") for label in (SERIAL, PARALLEL, CONTROLLED))
    worse, recovered = compare(plain, serial) == Compared.WORSE, compare(controlled, serial) != Compared.WORSE
    tied = {label: last(rows[PROBES][label], "rank_correlation") for label in STACKS}
    every = [value >= CORRELATED for values in tied.values() for value in values]
    ends, middle = (last(rows[PROBES][PLAIN], f"growth_of_{part}") for part in ("ends", "middle"))
    more = [a > b for a, b in zip(ends, middle, strict=True)]
    apart = {label: max(last(of, "difference")) for label, of in rows.get(COMPOSITION, {}).items()}
    return {
        VIT: Verdict(
            "holds" if worse and recovered else "does not hold",
            f"Accuracy {show('accuracy', serial)} % serially, {show('accuracy', plain)} % layer-parallel, "
            f"{show('accuracy', controlled)} % with the controller, which may go back and forth.",
        ),
        TELLS: Verdict(
            answer(every),
            "Rank correlation of ρ and bias within a run, by seed: "
            + "; ".join(f"{label} {', '.join(f'{value:.2f}' for value in values)}" for label, values in tied.items())
            + ".",
        ),
        STIFF: Verdict(
            answer(more),
            f"Lipschitz estimates become {mean(ends):.2f} times as large in the two first and two last layers and "
            f"{mean(middle):.2f} times in the others; more at the ends with {sum(more)} of {len(more)} seeds.",
        ),
        DATA: Verdict(
            "holds" if apart and max(apart.values()) <= EQUAL else "does not hold",
            "Largest difference of a weight after some steps on 2 × 2 processes and on one, as a part of the largest "
            f"change: {', '.join(f'{label} {value:.1e}' for label, value in apart.items())}.",
        ),
    }


def study(size: Size = "here", *, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """A ViT three ways, a language model under watch, and meshes of processes."""
    recipe, vit, text, gpt = "fashion_vit", VIT_OPTIONS, "shakespeare_gpt", GPT
    stacks, shared, folder = STACKS, SHARED, ""
    if size == "smoke":
        vit, seeds = {**VIT_OPTIONS, **schedules.DIGITS, "budget": "1536 layer_evals"}, seeds[:1]
        gpt = {**GPT, "width": 8, "mlp": 16, "context": 16, "batch_size": 4, "validations": 2, "probe_every": 2}
        gpt |= {"budget": "384 layer_evals"}
        shared = {}  # eight processes, which take longer than the rest
    elif size == "paper":
        recipe = "paraformer_authors_224"
        vit = {**schedules.AUTHORS, "model": "vit_tiny", "schedule": "joint", "depth": 32, "step": 1 / 32}
        vit |= {"width": 768, "heads": 12, "mlp": 3072, "batch_size": 4, "budget": "100 epochs"}
        text, folder = "gpt2_openwebtext", "openwebtext"
        watched = ("control", "probe_every", "rho_threshold", "exact_probe", "lipschitz")
        gpt = {"forward_iterations": 1, **{key: GPT[key] for key in watched}, "probe_every": 500}
        stacks = {PLAIN: {"step": 1 / 20, "buffers": [0, 0]}, BUFFERED: {"step": 1 / 16, "buffers": [2, 2]}}
    rows: dict[str, dict[str, Any]] = {SERIAL: {}, PARALLEL: PUBLISHED, CONTROLLED: {**PUBLISHED, **CONTROL}}
    slugs = {label: label.replace(",", "").replace(" ", "-") for label in (*rows, *stacks)}
    cells = [
        Cell(f"images-{slugs[label]}-{seed}", IMAGES, label, recipe, {**vit, **own}, seed)
        for label, own in rows.items()
        for seed in seeds
    ]
    probed = [
        Cell(f"text-{slugs[label]}-{seed}", TEXT, label, text, {**gpt, **own}, seed, folder=folder)
        for label, own in stacks.items()
        for seed in seeds
    ]
    cells += probed
    for run in probed:
        name = run.name.replace("text-", "probes-", 1)
        cells.append(Cell(name, PROBES, run.label, "probes", {}, run.seed, after=run, command="measure"))
    for what, label in shared.items():
        cells += [
            Cell(f"mesh-{what}-{seed}", COMPOSITION, label, "composition", {"shared": what}, seed, command="measure")
            for seed in seeds
        ]
    curves = (
        Curve("rho", "step", "batch", "Convergence factor ρ of the probes", log_y=True),
        Curve("bias", "step", "batch", "Bias of the gradient, 1 − cosine", log_y=True),
        Curve("lipschitz_last", tuple(range(1, 129)), "layer", "Lipschitz estimate at the end of training"),
    )
    return Study(
        name="indicator",
        title="Layer-parallel training: images, the indicator, stiff layers, meshes of processes",
        question="Does a probe's convergence factor tell when gradients are biased, where does a network stiffen, and "
        "does layer-parallel training keep its accuracy on images and on a mesh with data parallelism?",
        cells=tuple(cells),
        findings=findings,
        headline={TEXT: "loss"},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
        curves={PROBES: curves},
    )
