"""What a figure by prefix is called, how it is written, and which way is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from paradepth.report import text


@dataclass(frozen=True)
class Measure:
    """A figure that runs have for every prefix.

    Attributes:
        key: its key in `evaluation.json`, in validation events and in the records of a study.
        name: its name in a sentence.
        percent: whether values are fractions, shown in per cent.
        digits: after the point, as shown.
        lower: whether lower is better.

    >>> ACCURACY = measure("accuracy")
    >>> ACCURACY.show(0.8703), ACCURACY.difference(-0.004), ACCURACY.difference(-1e-9), ACCURACY.title
    ('87.03\\u202f%', '−0.40', '0.00', 'accuracy, %')
    >>> measure("bits_per_byte").show(3.2271), measure("new_score").title
    ('3.227', 'new score')
    """

    key: str
    name: str
    percent: bool = False
    digits: int = 3
    lower: bool = False

    @property
    def factor(self) -> float:
        """What values are multiplied by to be drawn."""
        return 100.0 if self.percent else 1.0

    @property
    def title(self) -> str:
        """Name with its unit, for an axis."""
        return f"{self.name}, %" if self.percent else self.name

    @property
    def capital(self) -> str:
        """`title` as a headline."""
        return self.title[:1].upper() + self.title[1:]

    def show(self, value: float, *, bare: bool = False) -> str:
        """A value as text; `bare` leaves out the sign of per cent."""
        if not bare and self.percent:
            return text.percent(value, self.digits)
        return text.decimal(self.factor * value, self.digits)

    def difference(self, value: float) -> str:
        """A signed difference of two values, in the unit of `title`."""
        if not math.isfinite(value):
            return text.MISSING
        shown = f"{self.factor * value:+.{self.digits}f}"
        return shown.replace("-", "−") if float(shown) else shown[1:]

    def worth(self, value: float) -> float:
        """A number to sort by, the best highest; values that are not finite come last."""
        if not math.isfinite(value):
            return -math.inf
        return -value if self.lower else value


_MEASURES = {
    found.key: found
    for found in (
        Measure("accuracy", "accuracy", percent=True, digits=2),
        Measure("loss", "loss", digits=4, lower=True),
        Measure("calibration_error", "calibration error", percent=True, digits=2, lower=True),
        Measure("gate", "mean gate"),
        Measure("gate_spread", "spread of the gate"),
        Measure("perplexity", "perplexity", digits=2, lower=True),
        Measure("bits_per_byte", "bits per byte", lower=True),
        Measure("f1", "F1", percent=True, digits=2),
        Measure("matthews", "Matthews correlation"),
        Measure("upos_accuracy", "UPOS accuracy", percent=True, digits=2),
        Measure("features_accuracy", "features accuracy", percent=True, digits=2),
        Measure("exact_accuracy", "exact-sequence accuracy", percent=True, digits=2),
        Measure("bleu", "BLEU", digits=2),
        Measure("chrf", "chrF", digits=2),
    )
}


def is_known(key: str) -> bool:
    """Whether a measure has a unit and digits of its own."""
    return key in _MEASURES


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for one value).

    >>> spread([0.5, 0.7, 0.6])
    (0.6, 0.1)
    """
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return float(f"{statistics.fmean(values):.12g}"), float(f"{deviation:.12g}")


def measure(key: str) -> Measure:
    """The measure of that key; an unknown one is a plain number of which more is better."""
    return _MEASURES.get(key) or Measure(key, key.replace("_", " "))
