"""What the records of the study `branch_sum` say: paragraphs, and a verdict for each claim."""

from __future__ import annotations

from statistics import mean
from typing import Any

from paradepth.studies._branch_sum_grid import (
    AT_ONCE,
    DISTANCE,
    MINILM,
    MINILM_DISTANCE,
    ON,
    SERIAL,
    Scale,
    Stacks,
    shape,
)
from paradepth.studies.claim import DUAT, LAYER_PARALLEL, PARAFORMER, Claim, Verdict
from paradepth.studies.record import by_row, last, measured
from paradepth.studies.rules import Compared, answer, compare, one_seed, show

LOSE_NOTHING = "parallel-layers-lose-nothing"
CONVERTED = "serial-stack-becomes-branches"
PREDICTS = "interval-error-predicts-first-guess"
CLAIMS = (
    Claim(
        LOSE_NOTHING,
        "Layers in parallel lose nothing against layers in series, because collaboration, not depth, does the work.",
        DUAT,
    ),
    Claim(
        CONVERTED,
        "Can a trained serial stack be converted to branches by short fine-tuning, and what does it cost?",
        PARAFORMER,
        "question",
    ),
    Claim(
        PREDICTS,
        "Does the error of one interval's branch sum tell how good the first guess of layer-parallel training is?",
        LAYER_PARALLEL,
        "question",
    ),
)
LIMITS = {"accuracy": 0.01, "loss": 0.01}  # below the serial stack: points of accuracy, part of the loss
FACTOR = 2.0  # by which a first guess may differ from its prediction
_Records = list[dict[str, Any]]
_Found = dict[str, dict[str, _Records]]  # group → label → records by seed


def findings(records: _Records, scale: Scale) -> list[str]:
    """Distances; then for each data set what conversion costs and brings back; then the encoder of sentences."""
    found = by_row(records)
    texts = [_about_distance(found, group) for group in (DISTANCE, MINILM_DISTANCE)]
    for chosen in scale.sets:
        if chosen.scratch:
            texts += [_about_branches(found, chosen, scale, label) for label in chosen.rows]
            texts.append(_about_serial(found, chosen, scale))
    texts += [_about_once(found, chosen) for chosen in scale.sets if chosen.at_once]
    return [*texts, _about_minilm(found, scale)]


def verdicts(records: _Records, scale: Scale) -> dict[str, Verdict]:
    """By differences of means against two standard errors, by limits, and by a factor; one seed tells nothing."""
    if len(scale.seeds) < 2:
        return one_seed(CLAIMS)
    found = by_row(records)
    return {
        LOSE_NOTHING: _lose_nothing(found, scale),
        CONVERTED: _can_be_converted(found, scale),
        PREDICTS: _predicts(found),
    }


def _lose_nothing(found: _Found, scale: Scale) -> Verdict:
    """Branches of the same layers from scratch, jointly, against the stack: none may be worse."""
    held, kept, shown = [], [], []
    for chosen in (each for each in scale.sets if each.scratch):
        serial = _trained(found, chosen, SERIAL)
        parts = [f"in series {show(chosen.key, serial)}"]
        for n in chosen.branches:
            ours = _trained(found, chosen, shape(n, chosen.depth))
            worse = compare(ours, serial, lower=chosen.key == "loss") == Compared.WORSE
            held.append(not worse)
            if not worse:
                kept.append(f"{n} branches on {chosen.name}")
            parts.append(f"{n} branches {show(chosen.key, ours)}{' (worse)' if worse else ''}")
        shown.append(f"{chosen.name}, {chosen.depth} layers, test {chosen.key}: {', '.join(parts)}")
    condition = f" Nothing is lost by {', '.join(kept)}." if 0 < len(kept) < len(held) else ""
    return Verdict(answer(held), "; ".join(shown) + f".{condition}")


def _can_be_converted(found: _Found, scale: Scale) -> Verdict:
    """Within the limit of the serial stack after at most the longest distillation."""
    reached, shown = [], []
    for chosen in (each for each in scale.sets if each.scratch):
        for label in chosen.rows:
            at = _least_fraction(found, chosen, scale, label)
            reached.append(at is not None)
            once, end = (_after(found, chosen, label, k) for k in (0, -1))
            cost = "not within the limit" if at is None else f"within it after {100 * at:g} % of its budget"
            figures = f"{show(chosen.key, once)} at once, {show(chosen.key, end)} at the end, {cost}"
            shown.append(f"{label} on {chosen.name}: {figures}")
    encoder = ", ".join(
        f"{label} {show('accuracy', [record['measures']['cosine'][-1] for record in row])}"
        for label, row in found[MINILM].items()
    )
    return Verdict(
        answer(reached),
        f"The limit is {limits()} of the serial stack. {'; '.join(shown)}. MiniLM, cosine in % of its embeddings to "
        f"the serial encoder's after a short distillation: {encoder}.",
    )


def _predicts(found: _Found) -> Verdict:
    """Measured and predicted errors of trained stacks, for every length above 1, within a factor."""
    within, beyond, ratios = [], [], []
    for group, prefix in ((DISTANCE, "trained_"), (MINILM_DISTANCE, "")):
        for label, row in found[group].items():
            lengths = [int(n) for n in row[0]["measures"]["lengths"]]
            for place, length in enumerate(lengths):
                if length in (1, lengths[-1]):  # exact, or a single interval, which is its own prediction
                    continue
                ratio = _mean(row, f"{prefix}first_guess", place) / _mean(row, f"{prefix}predicted", place)
                ratios.append(f"{label}, {length} layers: {ratio:.2f}")
                within.append(1 / FACTOR <= ratio <= FACTOR)
                if not within[-1]:
                    beyond.append(f"{label}, {length} layers")
    condition = f" Beyond a factor of {FACTOR:g}: {'; '.join(beyond)}." if 0 < len(beyond) < len(within) else ""
    return Verdict(
        answer(within),
        "Error of the first guess, as a multiple of the errors of single intervals added up: "
        f"{'; '.join(ratios)}.{condition}",
    )


def _about_distance(found: _Found, group: str) -> str:
    parts = []
    for label, row in found[group].items():
        lengths = [int(n) for n in row[0]["measures"]["lengths"]]
        for prefix in ("initial_", "trained_") if group == DISTANCE else ("",):
            of_length = ", ".join(
                f"{length}: {_mean(row, prefix + 'increment', k):.2g} ({_mean(row, prefix + 'state', k):.2g}; "
                f"{_mean(row, prefix + 'first_guess', k):.2g})"
                for k, length in enumerate(lengths)
                if length > 1
            )
            name = f"{label}{', ' + prefix.rstrip('_') if prefix else ''}"
            parts.append(f"{name}, by layers of an interval {of_length}")
    return (
        "Relative error of the branch sum's increment (of the state; of MGRIT's first guess with these intervals): "
        f"{'. '.join(parts)}."
    )


def _about_branches(found: _Found, chosen: Stacks, scale: Scale, label: str) -> str:
    """One way to convert: at once, after every fraction, from scratch."""
    key, serial = chosen.key, _trained(found, chosen, SERIAL)
    courses = [
        f"{way} "
        + ", ".join(
            f"{show(key, _measures(found, chosen.converted, label, f'{way}_{key}', k))} ({100 * fraction:g} %)"
            for k, fraction in enumerate(scale.fractions, start=1)
        )
        for way in ("tuned", "distilled")
    ]
    text = (
        f"{chosen.name}, {label}, test {key}: serial {show(key, serial)}; at once "
        f"{show(key, _after(found, chosen, label, 0))}; {'; '.join(courses)}."
    )
    n = chosen.rows[label]["branches"]
    if n not in chosen.branches or "buffers" in chosen.rows[label]:
        return text
    scratch = _trained(found, chosen, shape(n, chosen.depth))
    against = compare(_after(found, chosen, label, -1), scratch, lower=key == "loss")
    return (
        f"{text} The same branches from scratch with the whole budget: {show(key, scratch)}; the distilled conversion "
        f"at the end, against them: {against.value}."
    )


def _about_serial(found: _Found, chosen: Stacks, scale: Scale) -> str:
    key = chosen.key
    course = ", ".join(
        f"{show(key, _measures(found, chosen.trained_on, ON, f'tuned_{key}', k))} ({100 * fraction:g} %)"
        for k, fraction in enumerate(scale.fractions, start=1)
    )
    return f"{chosen.name}, the serial stack trained on for as long, test {key}: {course}."


def _about_once(found: _Found, chosen: Stacks) -> str:
    key, rows = chosen.key, found[AT_ONCE]
    parts = [
        f"{label} {show(key, [measured(record, f'tuned_{key}')[0] for record in rows[f'{chosen.name}, {label}']])}"
        for label in chosen.at_once
    ]
    return (
        f"{chosen.name}, test {key} right after conversion: serial {show(key, _trained(found, chosen, SERIAL))}; "
        f"{'; '.join(parts)}."
    )


def _about_minilm(found: _Found, scale: Scale) -> str:
    parts = []
    for label, row in found[MINILM].items():
        before_after = {
            key: [show("accuracy", [record["measures"][key][k] for record in row]) for k in (0, 1)]
            for key in ("cosine", "similarity", "probe_accuracy")
        }
        shown = ", ".join(f"{key.replace('_', ' ')} {a} → {b}" for key, (a, b) in before_after.items())
        parts.append(f"{label}: {shown}")
    serial = [record["measures"]["serial_accuracy"] for record in next(iter(found[MINILM].values()))]
    return (
        "MiniLM on SST-2's sentences, right after conversion → after distillation, each in %: "
        f"{'; '.join(parts)}. The probe's accuracy on the serial encoder: {show('accuracy', serial)}."
    )


def _least_fraction(found: _Found, chosen: Stacks, scale: Scale, label: str) -> float | None:
    """The shortest distillation after which the mean is within the limit of the serial stack's; 0: at once."""
    serial = mean(_trained(found, chosen, SERIAL))
    for k, fraction in enumerate((0.0, *scale.fractions)):
        ours = mean(_after(found, chosen, label, k))
        limit = LIMITS[chosen.key]
        if (ours <= serial * (1 + limit)) if chosen.key == "loss" else (ours >= serial - limit):
            return fraction
    return None


def _after(found: _Found, chosen: Stacks, label: str, k: int) -> list[float]:
    """After the k-th distillation; 0 is right after conversion."""
    return _measures(found, chosen.converted, label, f"distilled_{chosen.key}", k)


def limits() -> str:
    """How far below the serial stack a conversion may be, in words."""
    return f"{100 * LIMITS['accuracy']:g} point of accuracy, or {100 * LIMITS['loss']:g} % of the loss,"


def _trained(found: _Found, chosen: Stacks, label: str) -> list[float]:
    return last(found[chosen.trained][label], chosen.key)


def _measures(found: _Found, group: str, label: str, key: str, k: int) -> list[float]:
    return [measured(record, key)[k] for record in found[group][label]]


def _mean(row: _Records, key: str, k: int) -> float:
    return mean(measured(record, key)[k] for record in row)
