"""May attention be treated as a linear map that does not depend on the input?

Attention against static mixing, trained from scratch at equal parameters and equal layer evaluations, and attention
replaced after training by the best static map (`paradepth.theory.relax`), on images, on texts, and on sequences made by
a rule for which a token has to look where its content says.

117 cells. On one core a run on images takes about a minute, or three where it is four times as long, one on texts or
sequences less, and a measurement between a quarter of a minute and one: about 60 minutes of two cores.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.nn.static_mixing import equal_shape
from paradepth.studies.claim import DUAT, PARAFORMER, Claim, Verdict
from paradepth.studies.record import measured
from paradepth.studies.rules import answer, doubt, show
from paradepth.studies.study import Cell, Curve, Size, Study

ATTENTION, STATIC = "attention", "static mixing"
SERIAL = "serial"  # in front of the two, of the stack that is held beside the branches
AFTER = "attention replaced after training"
LIMIT = 0.01  # of accuracy: what counts as kept
LEARNED = 0.9  # accuracy of attention from which a task made by a rule counts as learned

CLAIM = Claim(
    "relaxed-attention",
    "Attention may be relaxed to a linear map: what a model can do rests on universal approximation by its "
    "feed-forward parts, not on where its tokens look.",
    DUAT,
)
QUESTION = Claim(
    "relaxed-after-training",
    "Does a trained model keep its accuracy when its attention is replaced by the best linear map that does not depend "
    "on the input (stress test of the relaxed attention)?",
    PARAFORMER,
    "question",
)

COMMON: dict[str, Any] = {
    "width": 64,
    "heads": 2,
    "dropout": 0.0,
    "schedule": "joint",
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.1,
    "decay": "cosine",
    "label_smoothing": 0.0,
    "ema": 0.0,
    "validations": 4,
}
_BRANCHES: dict[str, Any] = {"branches": 3, "depth": 2}
_PICTURES: dict[str, Any] = {**_BRANCHES, "model": "paraformer_nano", "patch_size": 4, "flip": True, "batch_size": 64}
_PICTURES |= {"embedding": "linear", "crop_padding": 2}
_TEXT: dict[str, Any] = {"model": "gpt_nano", "context": 64, "batch_size": 16, "validation_fraction": 0.05}
_SEQUENCES: dict[str, Any] = {"model": "gpt_nano", "branches": 0, "depth": 2, "batch_size": 64, "learning_rate": 4e-3}
_SEQUENCES |= {"weight_decay": 0.0}

# Group: recipe, options, tokens of a sample, and whether a serial stack is held beside the branches.
_Group = tuple[str, dict[str, Any], int, bool]


def _sequences(name: str, length: int, tokens: int, budget: str, **options: Any) -> _Group:
    recipe = "copying" if name == "copying_fixed" else name
    return recipe, {**_SEQUENCES, "data": name, "length": length, "budget": budget, **options}, tokens, False


_IMAGES = {"Fashion-MNIST": ("fashion", "fashion_mnist", 49), "CIFAR-10": ("cifar10", "cifar10", 64)}
_BUDGETS = {"": "2e5 layer_evals", ", four times as long": "8e5 layer_evals"}
_HERE: dict[str, _Group] = {
    **{
        title + more: (f"{recipe}_paraformer", {**_PICTURES, "data": data, "budget": budget}, tokens, False)
        for more, budget in _BUDGETS.items()
        for title, (recipe, data, tokens) in _IMAGES.items()
    },
    "tiny Shakespeare": (
        "shakespeare_gpt",
        {**_TEXT, **_BRANCHES, "step": 1.0, "buffers": [0, 0], "budget": "1e5 layer_evals"},
        64,
        True,
    ),
    "recall, 4 pairs": _sequences("recall", 4, 16, "2e5 layer_evals"),
    "recall, 8 pairs": _sequences("recall", 8, 32, "2e5 layer_evals"),
    "copying among blanks, 8 symbols": _sequences("copying", 8, 24, "2e5 layer_evals"),
    "copying among blanks, 16 symbols": _sequences("copying", 16, 48, "2e5 layer_evals"),
    "copying in fixed places, 16 symbols": _sequences("copying_fixed", 16, 48, "2e5 layer_evals"),
    "sorting, 8 letters": _sequences("sorting", 8, 16, "2e5 layer_evals"),
    "sorting, 16 letters": _sequences("sorting", 16, 32, "2e5 layer_evals"),
}
_SMOKE: dict[str, _Group] = {
    "recall, 2 pairs": _sequences("recall", 2, 8, "20 steps", branches=2, depth=1, batch_size=16, validations=1)
}
_TINY: dict[str, Any] = {"width": 192, "heads": 3, "branches": 4, "depth": 6, "budget": "100 epochs"}
_PAPER: dict[str, _Group] = {
    **{
        f"{title}, ViT-Tiny width": (
            f"{recipe}_paraformer",
            {**_TINY, "model": "paraformer_tiny", "patch_size": 4},
            n,
            True,
        )
        for title, recipe, n in (
            ("CIFAR-10", "cifar10", 64),
            ("CIFAR-100", "cifar100", 64),
            ("Fashion-MNIST", "fashion", 49),
        )
    },
    "OpenWebText, GPT-2": ("gpt2_openwebtext", {"width": 768, "heads": 12, "executor": "serial"}, 1024, False),
    **{f"recall, {n} pairs": _sequences("recall", n, 4 * n, "5e6 layer_evals") for n in (4, 8, 16, 26)},
    **{f"copying among blanks, {n} symbols": _sequences("copying", n, 3 * n, "5e6 layer_evals") for n in (8, 32, 128)},
    **{f"sorting, {n} letters": _sequences("sorting", n, 2 * n, "5e6 layer_evals") for n in (8, 32, 128)},
}
_GROUPS: dict[Size, dict[str, _Group]] = {"smoke": _SMOKE, "here": _HERE, "paper": _PAPER}


# ---- what was found ------------------------------------------------------------------------------------------------


_WAYS = {
    "everywhere": "the best linear map",
    "everywhere_mean": "the mean of A(x)",
    "everywhere_nothing": "nothing",
}


def findings(records: list[dict[str, Any]]) -> list[str]:
    """Of each group what is lost from scratch and after training; whole sequences; then where a single layer or branch
    matters most."""
    pairs, after = _pairs(records), _after(records)
    texts = []
    for name, (ours, theirs) in pairs.items():
        text = f"{name}: {show('accuracy', ours)} % with attention, {show('accuracy', theirs)} % with static mixing"
        text += f" from scratch ({_difference(ours, theirs)})"
        if name in after:
            m = after[name]
            kept = f"{show('accuracy', m['accuracy'])} % of the trained model (on the samples tested)"
            lost = ", ".join(f"{100 * mean(m[f'lost_{key}']):.2f} by {way}" for key, way in _WAYS.items())
            text += f". After training, of {kept} points are lost when attention is replaced everywhere: {lost}"
        texts.append(f"{text}.")
    whole = _pairs([record for record in records if _by_rule(record["group"])], "exact_accuracy")
    if whole:
        shown = "; ".join(
            f"{name} {100 * mean(ours):.1f} and {100 * mean(theirs):.1f}" for name, (ours, theirs) in whole.items()
        )
        texts.append(f"Sequences answered without a mistake, in %, with attention and with static mixing: {shown}.")
    alone = {name: m for name, m in after.items() if len(m["lost_by_layer"][0]) > 1}
    for name, m in alone.items():
        by_layer = [mean(values) for values in zip(*m["lost_by_layer"], strict=True)]
        worst = max(range(len(by_layer)), key=lambda n: by_layer[n])
        text = f"{name}, one layer alone: between {100 * min(by_layer):.2f} and {100 * max(by_layer):.2f} points lost"
        if max(by_layer) > 0:
            text += f", most in layer {worst + 1} of {len(by_layer)}"
        if "lost_by_branch" in m:
            by_branch = [mean(values) for values in zip(*m["lost_by_branch"], strict=True)]
            text += f"; one branch alone: {', '.join(f'{100 * value:.2f}' for value in by_branch)}"
        texts.append(f"{text}.")
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Kept is what loses no more than a point of accuracy, or no more than two standard errors of the difference. All
    kept: holds; none: does not hold. Tasks that attention itself does not learn (below 90 % of a rule's answers) tell
    nothing."""
    pairs, after = _pairs(records), _after(records)
    told = [name for name, (ours, _) in pairs.items() if not _by_rule(name) or mean(ours) >= LEARNED]
    scratch = {name: _kept(*pairs[name]) for name in told}
    zero = {name: [0.0] * len(after[name]["accuracy"]) for name in after}
    trained = {name: _kept(zero[name], [-v for v in after[name]["lost_everywhere"]]) for name in told if name in after}
    figures = {
        name: f"{name} {100 * (mean(ours) - mean(theirs)):.1f}"
        for name, (ours, theirs) in pairs.items()
        if name in told
    }
    replaced = {name: f"{name} {100 * mean(m['lost_everywhere']):.1f}" for name, m in after.items() if name in told}
    silent = [name for name in pairs if name not in told]
    more = f" Attention itself does not learn {', '.join(silent)} at this budget." if silent else ""
    return {
        CLAIM.name: _verdict(scratch, figures, "Points of accuracy that static mixing is behind, from scratch", more),
        QUESTION.name: _verdict(trained, replaced, "Points lost when all attention is replaced after training", more),
    }


def _verdict(kept: dict[str, bool], figures: dict[str, str], what: str, more: str) -> Verdict:
    if not kept:
        return Verdict("could not be tested here", f"Attention learns none of the tasks.{more}")
    parts = {word: [figures[n] for n, is_kept in kept.items() if is_kept == flag] for word, flag in _KEPT.items()}
    shown = "; ".join(f"{word}: {', '.join(some)}" for word, some in parts.items() if some)
    return Verdict(answer(kept.values()), f"{what}: {shown}.{more}")


_KEPT = {"kept": True, "lost": False}


def _kept(ours: list[float], theirs: list[float]) -> bool:
    """Whether accuracy is kept.

    >>> _kept([0.9, 0.91, 0.92], [0.901, 0.9, 0.92]), _kept([0.9, 0.91], [0.5, 0.6])
    (True, False)
    """
    lost = mean(ours) - mean(theirs)
    return lost <= max(LIMIT, doubt(ours, theirs))


def _difference(ours: list[float], theirs: list[float]) -> str:
    lost = 100 * (mean(ours) - mean(theirs))
    known = abs(lost) > 100 * doubt(ours, theirs)
    text = f"{abs(lost):.2f} points {'lost' if lost > 0 else 'gained'}"
    return text if known else f"{text}, within the spread of the seeds"


def _by_rule(name: str) -> bool:
    return name.startswith(("recall", "copying", "sorting"))


def _pairs(records: list[dict[str, Any]], measure: str = "accuracy") -> dict[str, tuple[list[float], list[float]]]:
    """A measure with attention and with static mixing, by group; of a serial stack under the group's name with a
    remark."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record["group"] == AFTER:
            continue
        shape, _, mixing = record["label"].rpartition(", ")
        name = f"{record['group']} ({shape})" if shape else record["group"]
        found.setdefault(name, {}).setdefault(mixing, []).append(measured(record, measure)[-1])
    return {name: (rows[ATTENTION], rows[STATIC]) for name, rows in found.items()}


def _after(records: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Measures after training by group, over the seeds."""
    found: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        if record["group"] == AFTER:
            row = found.setdefault(record["label"], {})
            for key, value in record["measures"].items():
                row.setdefault(key, []).append(value)
    return found


# ---- the grid ------------------------------------------------------------------------------------------------------


def study(size: Size = "here") -> Study:
    """Attention and static mixing on every task, and what is left of attention's models when it is replaced."""
    cells, after = [], []
    groups = _GROUPS[size]
    for group, (recipe, options, tokens, beside) in groups.items():
        shapes: dict[str, dict[str, Any]] = {"": {}}
        if beside:
            shapes[SERIAL] = _serial(options)
        for shape, own in shapes.items():
            chosen = {**COMMON, **options, **own}
            mlp = chosen.pop("mlp", 4 * chosen["width"])
            equal = equal_shape(chosen["width"], chosen["heads"], mlp, tokens)
            rows = {ATTENTION: {"mlp": mlp}, STATIC: {"mixing": "static", **equal}}
            slug = "-".join(f"{group} {shape}".replace(",", "").lower().split())
            for mixing, more in rows.items():
                label = f"{shape}, {mixing}" if shape else mixing
                given = {key: value for key, value in {**chosen, **more}.items() if value is not None}
                name = recipe.replace("paraformer", "vit") if shape == SERIAL else recipe
                for seed in range(1 if size == "smoke" else 3):
                    cell = Cell(f"{slug}-{mixing.split()[0]}-{seed}", group, label, name, given, seed)
                    cells.append(cell)
                    if mixing == ATTENTION:
                        row = f"{group} ({shape})" if shape else group
                        relax: dict[str, Any] = {"samples": 64, "tested": 100} if size == "smoke" else {}
                        after.append(
                            Cell(
                                f"{slug}-after-{seed}",
                                AFTER,
                                row,
                                "relaxation",
                                relax,
                                seed,
                                after=cell,
                                command="measure",
                            )
                        )
    return Study(
        name="relaxation",
        title="Attention relaxed to a linear map",
        question="How much accuracy is lost when attention does not depend on the input, trained so from the start or "
        "replaced after training, and where does universal approximation stop explaining the model?",
        cells=(*cells, *after),
        findings=findings,
        notes=_notes(groups),
        headline={group: "loss" for group, (recipe, *_) in groups.items() if recipe in _TEXTS},
        claims=(CLAIM, QUESTION),
        protocol=_PROTOCOL,
        verdicts=verdicts,
        curves={
            AFTER: (
                Curve("lost_by_layer", tuple(range(1, 25)), "layer", "accuracy lost, one layer alone"),
                Curve("error_by_layer", tuple(range(1, 25)), "layer", "what the best linear map leaves, all replaced"),
            )
        },
    )


_TEXTS = ("shakespeare_gpt", "gpt2_openwebtext")


def _serial(options: dict[str, Any]) -> dict[str, Any]:
    """A serial stack of the same layers."""
    own: dict[str, Any] = {"branches": 0, "depth": options["branches"] * options["depth"]}
    if options["model"].startswith("paraformer"):
        own["model"] = options["model"].replace("paraformer", "vit")
    return own


def _notes(groups: dict[str, _Group]) -> dict[str, str]:
    notes = {
        AFTER: "The models with attention of the other tables, of the first 2,000 test samples. Lost: accuracy, as a "
        "part of 1."
    }
    for group, (_, options, tokens, _) in groups.items():
        shape = (
            f"{options['branches']} branches of {options['depth']} layers" if options.get("branches") else "in series"
        )
        notes[group] = f"{tokens} tokens of a sample; {shape}; {options.get('budget', 'the budget of the recipe')}."
    return notes


_PROTOCOL = (
    "Width 64, two heads. Static mixing has one T × T matrix for each head in place of queries and keys, values and "
    "output as in attention; its feed-forward part is made wider or narrower so that parameters are equal up to half a "
    "hidden neuron's, and all rows of a table spend the same number of layer evaluations. After training, attention's "
    "matrices are replaced by those of least squares over 2,048 training samples, layer by layer from the first on; "
    "by the mean of A(x); and by nothing. No hyperparameter was chosen by the test set; both kinds have attention's. A "
    "task that attention answers by less than 90 % by rule tells nothing."
)
