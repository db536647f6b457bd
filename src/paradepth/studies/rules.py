"""Rules by which figures become verdicts: a difference counts where it exceeds what seeds alone make of it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import sqrt
from statistics import mean, stdev


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
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"
