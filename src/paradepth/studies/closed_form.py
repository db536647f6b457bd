"""Is a Transformer block a dynamic universal approximator in closed form, and what does the form say of trained models?

The closed form of `paradepth.theory` against random architectures, and against models of images (Fashion-MNIST) and of
text (Tiny Shakespeare, bytes) before and after training; of the latter, how much their operators depend on the input,
in how many directions a branch's operator acts, and which part of the logits each branch makes under joint and
stagewise training. 8 layers of width 64: 4 branches of 2, or a serial stack.

At size "here" 51 cells: 18 training runs of one to two minutes of one core, and 33 measurements, which take 2 to 15
seconds of one besides starting: about half an hour of one core.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.studies import schedules
from paradepth.studies.claim import DUAT, PARAFORMER, Claim, Verdict
from paradepth.studies.record import by_row, last, measured
from paradepth.studies.rules import Compared, answer, compare, plus_minus
from paradepth.studies.study import Cell, Curve, Size, Study

CLOSED, DEPENDENT, LOW_RANK, EVEN = (
    "block-is-dual-closed-form",
    "training-adds-input-dependence",
    "branches-act-in-few-directions",
    "joint-training-spreads-the-work",
)
CLAIMS = (
    Claim(
        CLOSED,
        "A Transformer block is a dynamic universal approximator in closed form, Σ_j α_j(x) σ(W_j(x) x + θ_j(x)).",
        DUAT,
    ),
    Claim(
        DEPENDENT,
        "Do the operators of attention and MLP depend more on the input after training than at initialisation?",
        DUAT,
        "question",
    ),
    Claim(
        LOW_RANK,
        "Does a trained branch act in few directions: is the effective rank of its operator below a tenth of its size?",
        PARAFORMER,
        "question",
    ),
    Claim(
        EVEN,
        "Is the work spread more evenly over the branches by joint training than by stagewise training?",
        PARAFORMER,
        "question",
    ),
)
EXACT = 1e-10
FEW = 0.1
PROTOCOL = (
    "Closed form: operators are built from weights and input, evaluated in double precision, and compared with the "
    "network: random trunks (1 to 3 branches of 1 to 3 layers, any heads, masks, steps), and every model below. Holds "
    f"if no relative error exceeds {EXACT:g}. Trained models: the same number of layer evaluations for all models of a "
    "data set; validation samples. Variation of an operator is √(E‖O − E O‖² / E‖O‖²) over samples. Input-dependence "
    "grows if attention's and the gates' mean variation are larger after training, by more than two standard errors "
    "over the seeds, on both data sets and for branches and serial stacks. Effective rank is (Σσ²)²/Σσ⁴ of L(x) − I, "
    "where a branch is L(x) x + l(x). Shares of the final logits have the final norm's scale frozen; the work is "
    "spread more evenly where the largest part of a branch in Σ|share| is smaller."
)

VARIATIONS = ("attention", "gates", "operator")

RANDOM = "random architectures"
JOINT, STAGEWISE, SERIAL = "PF 4×2 joint", "PF 4×2 stagewise", "serial, depth 8"
INITIAL = {JOINT: "PF 4×2, untrained", SERIAL: "serial, untrained"}
BEFORE = {**INITIAL, STAGEWISE: INITIAL[JOINT]}  # the same network, whatever order its branches learn in
SLUGS = {JOINT: "joint", STAGEWISE: "stagewise", SERIAL: "serial"}
SETS = ("images", "text")

IMAGES: dict[str, Any] = {**schedules.COMMON, "validations": 2, "budget": "4e5 layer_evals"}
TEXT: dict[str, Any] = {
    "model": "gpt_nano",
    "context": 64,
    "width": 64,
    "heads": 2,
    "mlp": 256,
    "dropout": 0.0,
    "batch_size": 16,
    "budget": "76800 layer_evals",
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "warmup": 0.1,
    "decay": "cosine",
    "validations": 2,
}
Rows = dict[str, tuple[str, dict[str, Any]]]  # recipe and options of each label


def _images(common: dict[str, Any]) -> Rows:
    return {
        JOINT: ("fashion_paraformer", {**common, "schedule": "joint"}),
        STAGEWISE: ("fashion_paraformer", {**common, **schedules.STAGEWISE}),
        SERIAL: ("fashion_vit", {**common, "schedule": "joint", "depth": 8}),
    }


def _text(common: dict[str, Any]) -> Rows:
    return {
        JOINT: ("shakespeare_gpt", {**common, "branches": 4, "depth": 2, "schedule": "joint"}),
        STAGEWISE: ("shakespeare_gpt", {**common, "branches": 4, "depth": 2, **schedules.STAGEWISE}),
        SERIAL: ("shakespeare_gpt", {**common, "branches": 0, "depth": 8, "schedule": "joint"}),
    }


def _paper_images() -> Rows:
    options: dict[str, Any] = {**schedules.AUTHORS, "data": "cifar10", "budget": "300 epochs", "validations": 20}
    return {
        JOINT: ("paraformer_authors_224", {**options, "schedule": "joint"}),
        STAGEWISE: ("paraformer_authors_224", {**options, **schedules.STAGEWISE}),
        SERIAL: ("paraformer_authors_224", {**options, "model": "vit_tiny", "depth": 16, "schedule": "joint"}),
    }


def _paper_text() -> Rows:
    options: dict[str, Any] = {"model": "gpt2", "data": "text", "tokenizer": "hub:gpt2"}
    options |= {"batch_size": 256, "budget": "100000 steps", "learning_rate": 6e-4, "weight_decay": 0.1}
    options |= {"optimiser": "adamw", "warmup": 0.02, "validation_fraction": 0.0005, "validations": 50}
    return {
        JOINT: ("shakespeare_gpt", {**options, "branches": 4, "depth": 3, "schedule": "joint"}),
        STAGEWISE: ("shakespeare_gpt", {**options, "branches": 4, "depth": 3, **schedules.STAGEWISE}),
        SERIAL: ("shakespeare_gpt", {**options, "branches": 0, "depth": 12, "schedule": "joint"}),
    }


def study(size: Size = "here") -> Study:
    """Random architectures, and three models of images and of text, trained and not."""
    seeds = (0,) if size == "smoke" else (0, 1, 2)
    count, samples = {"smoke": (6, 8), "here": (1000, 128), "paper": (10_000, 256)}[size]
    if size == "paper":
        rows = {"images": _paper_images(), "text": _paper_text()}
    elif size == "smoke":
        images = {**schedules.COMMON, **schedules.DIGITS, "budget": "4 steps"}
        small = {JOINT: {"branches": 2, "depth": 1}, STAGEWISE: {"branches": 2, "depth": 1}, SERIAL: {"depth": 2}}
        rows = {"images": {row: (recipe, chosen | small[row]) for row, (recipe, chosen) in _images(images).items()}}
    else:
        rows = {"images": _images(IMAGES), "text": _text(TEXT)}
    cells = [
        Cell(f"architectures-{seed}", RANDOM, "double precision", "closed_form_architectures", {"count": count}, seed,
             command="measure")
        for seed in seeds
    ]  # fmt: skip
    for data, of_data in rows.items():
        runs = {
            (label, seed): Cell(f"{data}-{SLUGS[label]}-{seed}", f"{data}, training", label, recipe, options, seed)
            for label, (recipe, options) in of_data.items()
            for seed in seeds
        }
        cells += runs.values()
        for state, names in (("initial", INITIAL), ("trained", {label: label for label in of_data})):
            cells += [
                Cell(f"{data}-{SLUGS[label]}-{state}-{seed}", data, name, "closed_form",
                     {"state": state, "samples": samples}, seed, after=runs[label, seed], command="measure")
                for label, name in names.items()
                for seed in seeds
            ]  # fmt: skip
    return Study(
        name="closed_form",
        title="The closed form, checked, and what it says of trained models",
        question="Does the dynamic universal approximator equal the network, and how much do its parameters depend on "
        "the input?",
        cells=tuple(cells),
        findings=findings,
        notes=_notes(size),
        headline={"text, training": "loss"} if "text" in rows else {},
        claims=CLAIMS,
        protocol=PROTOCOL,
        verdicts=verdicts,
        curves={
            data: (
                Curve("attention_by_layer", _counted(48), "layer", "Variation of attention's operator"),
                Curve("gates_by_layer", _counted(48), "layer", "Variation of the MLP's gates"),
                Curve(
                    "spectrum", _counted(16), "singular value", "Spectrum of a branch, the largest being 1", log_y=True
                ),
                Curve("share_by_branch", _counted(16), "branch", "Share of the final logits"),
                Curve("prefix_share_by_branch", _counted(16), "branch", "Share of the final logits, in order"),
            )
            for data in rows
        },
    )


def _counted(most: int) -> tuple[float, ...]:
    return tuple(float(number) for number in range(1, most + 1))


def _notes(size: Size) -> dict[str, str]:
    if size == "smoke":
        what = {"images, training": "Digits, four steps, and two layers in place of eight: a test of the code."}
    elif size == "paper":
        what = {"images, training": "CIFAR-10 at 224 pixels, 300 epochs.", "text, training": "OpenWebText, GPT-2."}
    else:
        what = {
            "images, training": "Fashion-MNIST, patches of 7 pixels, 400,000 layer evaluations.",
            "text, training": "Tiny Shakespeare, bytes, windows of 64; 600 batches of 16 through 8 layers.",
        }
    explained = "Means over layers and branches; each model is that of the run of its name and seed."
    return {**what, **dict.fromkeys(SETS if len(what) > 1 else SETS[:1], explained)}


# ---- what it says ----------------------------------------------------------------------------------------------

Records = list[dict[str, Any]]
_Found = dict[str, dict[str, Records]]  # group → label → records by seed


def _sets(found: _Found) -> list[str]:
    """The data sets that were measured; at size "smoke" there are images only."""
    return [data for data in SETS if data in found]


def findings(records: Records) -> list[str]:
    """Input-dependence, ranks and shares of each data set in words."""
    found = by_row(records)
    texts = [_closed(found).figure]
    for data in _sets(found):
        rows = found[data]
        texts.append(
            f"{data.capitalize()}, mean variation over the inputs of attention, of the MLP's gates and of a branch's "
            "operator: "
            + "; ".join(
                f"{row} {', '.join(plus_minus(last(of, key)) for key in VARIATIONS)}" for row, of in rows.items()
            )
            + "."
        )
        texts.append(
            f"{data.capitalize()}, effective rank of a branch's operator in per cent of its size: "
            + "; ".join(f"{row} {plus_minus(last(of, 'rank'), factor=100)}" for row, of in rows.items())
            + "."
        )
        for row in (JOINT, STAGEWISE):
            shares, ordered = (_by_branch(rows[row], key) for key in ("share_by_branch", "prefix_share_by_branch"))
            given = plus_minus(last(rows[row], "input_share"), factor=100, digits=1)
            texts.append(
                f"{data.capitalize()}, {row}: share of the final logits by branch {shares} % (input {given} %); as "
                f"what each changes behind those before it {ordered} %."
            )
    return texts


def _by_branch(of: Records, key: str) -> str:
    by_seed = (measured(record, key) for record in of)
    return ", ".join(f"{100 * mean(values):.1f}" for values in zip(*by_seed, strict=True))


def verdicts(records: Records) -> dict[str, Verdict]:
    """By the rules of the protocol."""
    found = by_row(records)
    return {
        CLOSED: _closed(found),
        DEPENDENT: _dependent(found),
        LOW_RANK: _low_rank(found),
        EVEN: _even(found),
    }


def _closed(found: _Found) -> Verdict:
    drawn = [record for of in found[RANDOM].values() for record in of]
    models = [record for data in _sets(found) for of in found[data].values() for record in of]
    count = sum(map(int, last(drawn, "architectures")))
    worst = {key: max(last(drawn, key)) for key in ("error", "units_error", "block_error")}
    of_models = max(last(models, "error"))
    figure = (
        f"Largest relative error {worst['error']:.1e} over {count} random architectures, {of_models:.1e} over "
        f"{len(models)} models of images and text, trained and not. As a single sum over hidden units in explicit "
        f"matrices {worst['units_error']:.1e}, for branches of one layer {worst['block_error']:.1e}. For one layer the "
        "parameters are softmax and norm scales of x; for depth d they hide the d − 1 blocks before the last one."
    )
    exact = max(*worst.values(), of_models) <= EXACT
    return Verdict("holds" if exact else "does not hold", figure)


def _dependent(found: _Found) -> Verdict:
    more, parts = [], []
    for data in _sets(found):
        for label, untrained in BEFORE.items():
            for key, name in (("attention", "attention"), ("gates", "gates")):
                after, before = (last(found[data][row], key) for row in (label, untrained))
                more.append(compare(after, before) == Compared.BETTER)
                parts.append(f"{data}, {label}, {name}: {plus_minus(before)} before, {plus_minus(after)} after")
    figure = f"Variation {'; '.join(parts)}: more after training in {sum(more)} of {len(more)} cases."
    return Verdict(answer(more), figure)


def _low_rank(found: _Found) -> Verdict:
    ranks = {
        f"{data}, {label}": last(found[data][label], "rank")
        for data in _sets(found)
        for label in (JOINT, STAGEWISE, SERIAL)
    }
    few = [mean(values) < FEW for values in ranks.values()]
    shown = "; ".join(f"{row} {plus_minus(values, factor=100)} %" for row, values in ranks.items())
    figure = f"Effective rank in per cent of T·D: {shown}: below {100 * FEW:.0f} % in {sum(few)} of {len(few)}."
    return Verdict(answer(few), figure)


def _even(found: _Found) -> Verdict:
    more, parts = [], []
    for data in _sets(found):
        joint, staged = (last(found[data][label], "largest") for label in (JOINT, STAGEWISE))
        more.append(compare(joint, staged, lower=True) == Compared.BETTER)
        parts.append(f"{data}: {plus_minus(joint, factor=100)} % joint, {plus_minus(staged, factor=100)} % stagewise")
    return Verdict(
        answer(more),
        f"Largest part of one of four branches in Σ|share| (a quarter if even), {'; '.join(parts)}: more even with "
        f"joint training in {sum(more)} of {len(more)} data sets.",
    )
