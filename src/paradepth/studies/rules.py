"""Rules by which figures become verdicts: a difference counts where it exceeds what seeds alone make of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from math import sqrt
from statistics import mean, stdev

from paradepth.studies.claim import Answer, Claim, Verdict


class Compared(StrEnum):
    """How one set of seeds stands against another."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "not told apart by these seeds"


def doubt(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Two standard errors of the difference of two means; 0 for single seeds, where there is no telling.

    >>> round(doubt([1.0, 1.2], [2.0, 2.0]), 3), doubt([1.0], [2.0])
    (0.2, 0.0)
    """
    if min(len(ours), len(theirs)) < 2:
        return 0.0
    return 2 * sqrt(stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs))


def compare(ours: Sequence[float], theirs: Sequence[float], *, lower: bool = False) -> Compared:
    """Whether ours is better or worse by more than two standard errors of the difference.

    Args:
        ours: a figure of each seed.
        theirs: the same of what it is held against.
        lower: whether lower figures are better.

    >>> compare([0.8, 0.81], [0.7, 0.71]).value, compare([1.0, 2.0], [1.2, 1.9], lower=True).value
    ('better', 'not told apart by these seeds')
    """
    gain = (mean(ours) - mean(theirs)) * (-1 if lower else 1)
    if abs(gain) <= doubt(ours, theirs):
        return Compared.SAME
    return Compared.BETTER if gain > 0 else Compared.WORSE


def show(key: str, values: list[float]) -> str:
    """Mean and deviation of a measure over the seeds.

    >>> show("accuracy", [0.5, 0.52]), show("loss", [1.25])
    ('51.00 ± 1.41', '1.2500')
    """
    factor, digits = {"accuracy": (100.0, 2), "loss": (1.0, 4)}.get(key, (1.0, 2))
    return plus_minus(values, factor=factor, digits=digits)


def plus_minus(values: Sequence[float], *, factor: float = 1.0, digits: int = 2) -> str:
    """Mean and deviation of figures, each times a factor; of a single one no deviation.

    >>> plus_minus([0.5, 0.52]), plus_minus([0.123], factor=100, digits=1)
    ('0.51 ± 0.01', '12.3')
    """
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


def answer(held: Collection[bool]) -> Answer:
    """What cases say together: all hold, some do, none does. Without a case nothing speaks against it.

    >>> answer([True, True]), answer([True, False]), answer([False])
    ('holds', 'holds with conditions', 'does not hold')
    """
    return "holds" if all(held) else "holds with conditions" if any(held) else "does not hold"


def one_seed(claims: Iterable[Claim]) -> dict[str, Verdict]:
    """The verdict for each claim of a study that was run with one seed.

    >>> from paradepth.studies.claim import DUAT
    >>> one_seed([Claim("more-is-better", "More is better.", DUAT)])["more-is-better"].verdict
    'could not be tested here'
    """
    reason = Verdict("could not be tested here", "A single seed tells no difference from chance.")
    return dict.fromkeys((claim.name for claim in claims), reason)
