"""What is told of repeated measurements of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, lower and upper quartile, to four digits.

    >>> quartiles([1.0, 2.0, 3.0, 10.0])
    {'median': 2.5, 'lower_quartile': 1.75, 'upper_quartile': 4.75}
    """
    lower, median, upper = (float(f"{q:.4g}") for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
