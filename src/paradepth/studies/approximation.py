"""How fast does the error fall with the number of branches, and does it matter in which order they learn?

Regression on functions whose smoothness is known exactly (`KnownFunction`): random Fourier series of order s in d
dimensions. The model is `Approximator`: a fixed embedding of the point into 4 tokens, branches of pre-LN layers of
width 8, a linear read-out of their sum. Training and test points are two draws and there is no noise, so the test error
is that of the approximation, and of the optimiser that looked for it.

Two questions, two kinds of groups. At equal layer evaluations for every model: which order, which shape? And with as
many updates for every model, so that larger ones get more compute: how does the error fall with the number of
branches, beside what theory leads one to expect? Definitions and sources are in `docs/approximation.md`.

AdamW at 0.02 for every model: of a function that is no cell's (d = 2, s = 1, seed 100), 1000 updates of 4 branches of
one layer, trained jointly, left 11.1, 8.2 and 7.0 % at rates 0.005, 0.02 and 0.05, and 6.5 % with Muon at 0.02, whose
updates take twice as long. At 0.02 a serial stack of 32 layers trains as well.

At size "here" a cell trains four models, in about a minute of one core: runs of 100 updates, or of 25,600 layer
evaluations, took 4.1 to 4.5 seconds on a busy machine, these are 16 and 17.5 times as long. All 72 cells take some 37
minutes of two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log, sqrt
from statistics import mean, stdev
from typing import Any

from paradepth.studies.claim import DUAT, PARAFORMER, Answer, Claim, Verdict
from paradepth.studies.record import by_row
from paradepth.studies.rules import Compared, answer, compare, one_seed
from paradepth.studies.study import Cell, Curve, Size, Study

SERIAL, JOINT, ONE_PASS, STAGEWISE = "serial", "joint", "one_pass", "stagewise"
FALLS, PROGRESSIVE = "each-branch-lowers-the-residual", "progressive-beats-joint"
NOTHING_LOST, MORE = "nothing-lost-on-known-functions", "more-parallel-layers-are-better"
GREEDY, ALIGNED = "greedy-rate", "progressive-branches-differ"

CLAIMS = (
    Claim(FALLS, "Each new branch lowers the loss that the ones before it left, L_i < L_{i−1}.", PARAFORMER),
    Claim(PROGRESSIVE, "Progressive approximation reaches a smaller error than joint training.", PARAFORMER),
    Claim(NOTHING_LOST, "Parallel layers lose nothing against as many serial ones.", DUAT),
    Claim(MORE, "The error falls as parallel layers are added.", DUAT),
    Claim(
        GREEDY,
        "Does the error of progressively trained branches fall at least as fast as n^{−1/2}, the rate of greedy "
        "approximation?",
        PARAFORMER,
        "question",
    ),
    Claim(
        ALIGNED,
        "Do branches that are trained progressively differ more in what their gradients would change than branches "
        "that are trained jointly?",
        PARAFORMER,
        "question",
    ),
)

# Dimension, smoothness, frequencies.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "d = 1, s = 1": {"dimension": 1, "smoothness": 1.0, "frequencies": 256},
    "d = 1, s = 2": {"dimension": 1, "smoothness": 2.0, "frequencies": 256},
    "d = 2, s = 1": {"dimension": 2, "smoothness": 1.0, "frequencies": 16},
    "d = 2, s = 2": {"dimension": 2, "smoothness": 2.0, "frequencies": 16},
}
# Parts of the budget; in stagewise training at least two branches are active from the first one on.
ALIGNED_AT = (0.4, 0.6, 0.8, 1.0)
COMPUTE, UPDATES = "equal compute", "equal updates"
COMPARED = "d = 2, s = 1"  # the function of the group of equal compute
NARROW: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 16, "tokens": 4, "optimiser": "adamw", "learning_rate": 0.02}
SIZES: dict[Size, dict[str, Any]] = {
    "smoke": {
        "seeds": (0,),
        "functions": ("d = 1, s = 1",),
        "depths": (1,),
        "orders": (SERIAL, JOINT, STAGEWISE),
        "layer_evals": 160.0,
        "steps": 4,
        "shape": {**NARROW, "branches": [1, 2], "batch_size": 16, "train_points": 64, "test_points": 64},
    },
    "here": {
        "seeds": (0, 1, 2),
        "functions": tuple(FUNCTIONS),
        "depths": (1, 2, 4),
        "orders": (SERIAL, JOINT, ONE_PASS, STAGEWISE),
        "layer_evals": 448_000.0,
        "steps": 1600,
        "shape": {**NARROW, "branches": [1, 2, 4, 8], "batch_size": 64, "train_points": 32768, "test_points": 4096},
    },
    "paper": {  # neither paper approximates functions: the width of their models, until the error stands still
        "seeds": (0, 1, 2),
        "functions": tuple(FUNCTIONS),
        "depths": (1, 2, 4, 6),
        "orders": (SERIAL, JOINT, ONE_PASS, STAGEWISE),
        "layer_evals": 1e9,
        "steps": 200_000,
        "shape": {
            "branches": [1, 2, 4, 8, 16],
            "batch_size": 512,
            "train_points": 1 << 20,
            "test_points": 1 << 16,
            "width": 192,
            "heads": 3,
            "mlp": 768,
            "tokens": 16,
            "optimiser": "adamw",
            "learning_rate": 1e-3,
        },
    },
}
_Rows = dict[tuple[str, str], list[dict[str, Any]]]


def findings(records: list[dict[str, Any]]) -> list[str]:
    """Errors at equal compute, rates, residuals of prefixes, alignments."""
    rows, texts = _rows(records), []
    groups = by_row(records)
    for group, of in groups.items():
        texts.append(f"{group}: error in % of the function by number of branches: {_shown(of, 'error')}.")
    rates = "; ".join(f"{_function(group)}, {label} {_rate(found)}" for (group, label), found in _updates(rows, ""))
    expected = ", ".join(f"{name} {-f['smoothness'] / f['dimension']:g}" for name, f in FUNCTIONS.items())
    texts.append(
        f"Slope of log error against log number of branches, ± two standard errors: {rates}. Expected of "
        f"the best n-parameter approximation, −s/d: {expected}; of greedy approximation from a convex hull −0.5."
    )
    compared = next((of for group, of in groups.items() if group.startswith(COMPUTE)), {})
    for what, key in (("stage", "stage_errors"), ("prefix of the trained model", "prefix_errors")):
        shown = _shown(compared, key)
        texts.append(f"Error in % at the end of each {what}, largest model (other groups: see the plots): {shown}.")
    for what, key in (
        ("what branches contribute", "contribution_alignment"),
        ("what branches' gradients would change", "update_alignment"),
    ):
        shown = _shown(compared, key, factor=1.0, form="+.2f")
        texts.append(f"Mean cosine between {what} after 40, 60, 80 and 100 % of the budget: {shown}.")
    return texts


def verdicts(records: list[dict[str, Any]]) -> dict[str, Verdict]:
    """By differences of logarithms between rows of equal seeds, against two standard errors of their mean."""
    rows = _rows(records)
    if min(len(found) for found in rows.values()) < 2:
        return one_seed(CLAIMS)
    return {
        FALLS: _falls(rows),
        PROGRESSIVE: _progressive(rows),
        NOTHING_LOST: _nothing_lost(rows),
        MORE: _more(rows),
        GREEDY: _greedy(rows),
        ALIGNED: _aligned(rows),
    }


def _falls(rows: _Rows) -> Verdict:
    """Each stage's error against the one before; holds where all fall, with conditions where none rises."""
    steps = [
        _told([log(before / after) for before, after in pairs])
        for (_, label), found in rows.items()
        if label.startswith(STAGEWISE)
        for pairs in zip(*(pairwise(r["measures"]["stage_errors"]) for r in found), strict=True)
    ]
    fall, rise = steps.count(Compared.BETTER), steps.count(Compared.WORSE)
    told: Answer = "holds" if fall == len(steps) else "does not hold" if rise or not fall else "holds with conditions"
    return Verdict(
        told,
        f"Of {len(steps)} steps from one stage's error to the next, {fall} go down and {rise} up by more than two "
        f"standard errors. {_alone(rows)}",
    )


def _alone(rows: _Rows) -> str:
    """Whether it is the new branches that lower the error, or the training that goes on: one branch that gets all."""
    signs = [
        _told([log(r["measures"]["error"][0] / r["measures"]["error"][place]) for r in found])
        for (group, label), found in rows.items()
        if group.startswith(COMPUTE) and label.startswith(STAGEWISE)
        for place in range(1, len(found[0]["measures"]["error"]))
    ]
    return (
        f"Against one branch that is trained with the compute of all stages, the error at the end is smaller in "
        f"{signs.count(Compared.BETTER)} and larger in {signs.count(Compared.WORSE)} of {len(signs)} shapes."
    )


def _progressive(rows: _Rows) -> Verdict:
    """Stagewise and one-pass training against joint training; holds where it is better wherever seeds tell, and that
    is half of the comparisons or more."""
    counts = {order: _compare(rows, order, JOINT) for order in (STAGEWISE, ONE_PASS)}
    better, worse, total, _ = counts[STAGEWISE]
    told: Answer = (
        "does not hold" if not better else "holds" if not worse and 2 * better >= total else "holds with conditions"
    )
    return Verdict(told, "; ".join(_said(order, JOINT, found) for order, found in counts.items() if found[2]) + ".")


def _nothing_lost(rows: _Rows) -> Verdict:
    """Branches trained jointly, as in the paper, against the serial stack; holds where they are nowhere worse."""
    counts = {order: _compare(rows, order, SERIAL) for order in (JOINT, STAGEWISE)}
    _, worse, total, _ = counts[JOINT]
    told: Answer = "holds" if not worse else "does not hold" if 2 * worse > total else "holds with conditions"
    return Verdict(told, "; ".join(_said(order, SERIAL, found) for order, found in counts.items()) + ".")


def _more(rows: _Rows) -> Verdict:
    """The slope of jointly trained branches below zero, at equal updates; holds where it is for every function."""
    return _of_rates(_updates(rows, JOINT), 0.0, "falls with the number of jointly trained branches")


def _greedy(rows: _Rows) -> Verdict:
    """The slope of progressively trained branches below −1/2, at equal updates; holds where it is for every one."""
    return _of_rates(_updates(rows, STAGEWISE), -0.5, "falls faster than n^(−1/2)")


def _of_rates(found: list[tuple[tuple[str, str], list[dict[str, Any]]]], limit: float, what: str) -> Verdict:
    steep = {
        _function(group): _told([limit - r["measures"]["rate"] for r in records]) == Compared.BETTER
        for (group, _), records in found
    }
    yes = [name for name, is_steep in steep.items() if is_steep]
    slopes = "; ".join(f"{_function(group)}: {_rate(records)}" for (group, _), records in found)
    return Verdict(answer(steep.values()), f"The error {what} for {'; '.join(yes) or 'no function'}. Slopes: {slopes}.")


def _aligned(rows: _Rows) -> Verdict:
    """Alignment of gradients' effects, mean over training: joint above stagewise."""
    signs, shown = [], []
    for (group, label), ours in rows.items():
        if label.startswith(STAGEWISE):
            theirs = rows[group, label.replace(STAGEWISE, JOINT)]
            pairs = [[mean(r["measures"]["update_alignment"]) for r in both] for both in zip(theirs, ours, strict=True)]
            signs.append(_told([joint - stagewise for joint, stagewise in pairs]))
            joint, stagewise = (mean(column) for column in zip(*pairs, strict=True))
            shown.append(f"{group}, {label.partition(', ')[2]}: {joint:+.2f}, {stagewise:+.2f}")
    yes, no = signs.count(Compared.BETTER), signs.count(Compared.WORSE)
    told: Answer = "does not hold" if not yes else "holds" if yes == len(signs) else "holds with conditions"
    return Verdict(
        told,
        f"Mean cosine, joint and stagewise: {'; '.join(shown)}. Smaller for stagewise in {yes} of {len(signs)} rows, "
        f"larger in {no}.",
    )


def _told(differences: Sequence[float]) -> Compared:
    """Better where the mean of differences of equal seeds is above zero, worse where it is below."""
    return compare(differences, [0.0] * len(differences))


def _compare(rows: _Rows, ours: str, theirs: str) -> tuple[int, int, int, float]:
    """Over all rows and all numbers of branches above one: how often `ours` has a smaller error, how often a larger
    one, of how many; and the mean ratio of the errors."""
    signs, ratios = [], []
    for (group, label), found in rows.items():
        other = rows.get((group, label.replace(ours, theirs)))
        if label.startswith(ours) and other is not None:
            for place, n in enumerate(found[0]["options"]["branches"]):
                if n > 1:
                    errors = [[r["measures"]["error"][place] for r in both] for both in zip(other, found, strict=True)]
                    differences = [log(b / a) for b, a in errors]
                    signs.append(_told(differences))
                    ratios += differences
    better, worse = signs.count(Compared.BETTER), signs.count(Compared.WORSE)
    return better, worse, len(signs), exp(-mean(ratios)) if ratios else 1.0


def _said(ours: str, theirs: str, found: tuple[int, int, int, float]) -> str:
    better, worse, total, ratio = found
    return (
        f"{ours} has a smaller error than {theirs} in {better} of {total} comparisons and a larger one in {worse}, "
        f"{ratio:.2f} times theirs on the geometric mean"
    )


def _rows(records: list[dict[str, Any]]) -> _Rows:
    """The records of each row, by seed."""
    return {
        (group, label): sorted(of, key=lambda r: r["seed"])
        for group, rows in by_row(records).items()
        for label, of in rows.items()
    }


def _updates(rows: _Rows, order: str) -> list[tuple[tuple[str, str], list[dict[str, Any]]]]:
    """The rows of equal updates, of one order of learning."""
    return [(key, found) for key, found in rows.items() if key[0].startswith(UPDATES) and key[1].startswith(order)]


def _function(group: str) -> str:
    return group.partition(", ")[2]


def _means(found: list[dict[str, Any]], key: str) -> list[float]:
    return [mean(column) for column in zip(*(record["measures"][key] for record in found), strict=True)]


def _shown(of: dict[str, list[dict[str, Any]]], key: str, *, factor: float = 100.0, form: str = ".1f") -> str:
    """The rows of a group with their means, where there is more than one."""
    return "; ".join(
        f"{label} " + " · ".join(f"{factor * value:{form}}" for value in means)
        for label, found in of.items()
        if len(means := _means(found, key)) > 1
    )


def _rate(found: list[dict[str, Any]]) -> str:
    rates = [record["measures"]["rate"] for record in found]
    doubt = f" ± {2 * stdev(rates) / sqrt(len(rates)):.2f}" if len(rates) > 1 else ""
    return f"{mean(rates):+.2f}{doubt}"


def study(size: Size = "here", *, seeds: tuple[int, ...] | None = None) -> Study:
    """Orders and shapes at equal compute for one function; numbers of branches at equal updates for all."""
    chosen = SIZES[size]
    counts = chosen["shape"]["branches"]
    compared = COMPARED if COMPARED in chosen["functions"] else chosen["functions"][0]
    tables = [(f"{COMPUTE}, {compared}", compared, chosen["depths"], {"layer_evals": chosen["layer_evals"]})]
    tables += [(f"{UPDATES}, {name}", name, (1,), {"steps": chosen["steps"]}) for name in chosen["functions"]]
    cells = [
        Cell(
            f"{group.replace(' = ', '').replace(', ', '-').replace(' ', '-')}-{order}-{depth}-{seed}",
            group,
            f"{order}, depth {depth}",
            "approximation",
            {**FUNCTIONS[name], **chosen["shape"], **budget, **own, "schedule": order, "depth": depth},
            seed,
            command="measure",
        )
        for group, name, depths, budget in tables
        for order in chosen["orders"]
        for own in [{} if order == SERIAL else {"aligned_at": list(ALIGNED_AT)}]
        if group.startswith(COMPUTE) or order != ONE_PASS
        for depth in depths
        for seed in (chosen["seeds"] if seeds is None else seeds)
    ]
    by_branches = Curve("error", tuple(counts), "branches", "Error by number of branches", log_x=True, log_y=True)
    stages = tuple(float(k) for k in range(1, counts[-1] + 1))
    drawn = (
        by_branches,
        Curve("stage_errors", stages, "stage", "Error at the end of each stage, largest model", log_y=True),
        Curve("prefix_errors", stages, "prefix", "Error of each prefix of the largest trained model", log_y=True),
        Curve("update_alignment", ALIGNED_AT, "part of the budget", "Cosine of what branches' gradients change"),
    )
    return Study(
        name="approximation",
        title="Progressive approximation of functions of known smoothness",
        question="How does the error fall with the number of branches and their depth, does the order in which they "
        "learn matter, and does each branch lower what the ones before it left?",
        cells=tuple(cells),
        findings=findings,
        notes={group: _note(group, chosen) for group, *_ in tables},
        curves={group: drawn for group, *_ in tables},
        claims=CLAIMS,
        protocol="Random Fourier series of order s in d dimensions; a fixed embedding, narrow branches, a linear "
        "read-out of their sum; test error relative to the function, on points that were not trained on. Rows of a "
        "seed share the function and the points. A difference, of logarithms of errors between rows of equal seeds, "
        "counts when it exceeds two standard errors of its mean.",
        verdicts=verdicts,
    )


def _note(group: str, chosen: dict[str, Any]) -> str:
    if group.startswith(COMPUTE):
        return f"{chosen['layer_evals']:,.0f} layer evaluations for every model, whatever its size."
    return (
        f"{chosen['steps']:,} updates of all branches for every model, or as many layer evaluations: larger models get "
        "more. The measure `rate` is the slope of log error against log number of branches."
    )
