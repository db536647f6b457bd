"""How long a run trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["epochs", "steps", "layer_evals"]


@dataclass(frozen=True)
class Budget:
    """How long to train.

    >>> Budget.parse("20 epochs"), Budget.parse("1.5e6 layer_evals")
    (Budget(value=20.0, unit='epochs'), Budget(value=1500000.0, unit='layer_evals'))
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "NUMBER UNIT".

        Raises:
            ValueError: not a positive number with one of the units epochs, steps, layer_evals.
        """
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(epochs?|steps?|layer_evals)\s*", text)
        try:
            value = float(match.group(1)) if match else 0.0
        except ValueError:
            value = 0.0
        if match is None or not 0 < value < float("inf"):
            raise ValueError(
                f"budget is {text!r}; write a positive number and a unit: '20 epochs', '300 steps' or '1e6 layer_evals'"
            )
        unit = match.group(2)
        return cls(value, unit if unit == "layer_evals" else unit.rstrip("s") + "s")  # pyright: ignore[reportArgumentType]
