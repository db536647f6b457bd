"""How much a quantity differs from input to input, gathered over batches.

Shapes: B batch, … the shape of the quantity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Variation:
    """√(E‖v − E v‖² / E‖v‖²) of a quantity v over inputs: 0 where it is the same for all of them, towards 1 where
    inputs have nothing in common.

    Entries may be missing for some inputs (tokens of padding); each is compared over the inputs that have it. The
    variance is that of a sample, so that few inputs do not make things look more alike than they are; entries that one
    input alone has are left out.

    >>> gathered = Variation()
    >>> gathered.add(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> round(gathered.value() ** 2, 4)  # variance 2 of the first entry, against (1 + 9 + 25 + 25) / 2
    0.0667
    """

    def __init__(self) -> None:
        self.count: Tensor | None = None
        self.sum: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, value: Tensor, there: Tensor | None = None) -> None:
        """Takes up the quantity of a batch.

        Args:
            value: (B, …); later batches may be larger or smaller in any dimension, entries then being counted from 0.
            there: which entries count, booleans that broadcast to it; None: all.
        """
        value = value.detach().double()
        weight = torch.ones_like(value) if there is None else there.to(value).expand_as(value)
        sums = weight.sum(0), (weight * value).sum(0), (weight * value.square()).sum(0)
        if self.count is None or self.sum is None or self.square is None:
            self.count, self.sum, self.square = sums
            return
        shape = [max(a, b) for a, b in zip(self.sum.shape, sums[1].shape, strict=True)]
        self.count, self.sum, self.square = (
            _padded(old, shape) + _padded(new, shape)
            for old, new in zip((self.count, self.sum, self.square), sums, strict=True)
        )

    def value(self) -> float:
        """The variation; 0 for a quantity that is zero everywhere, or that too few inputs have."""
        if self.count is None or self.sum is None or self.square is None:
            return 0.0
        several = self.count >= 2
        count, total, square = self.count[several], self.sum[several], self.square[several]
        variance = (square - total.square() / count).clamp(min=0) / (count - 1)
        size = float((square / count).sum())
        return min(float(variance.sum()) / size, 1.0) ** 0.5 if size > 0 else 0.0


def _padded(values: Tensor, shape: list[int]) -> Tensor:
    missing = [new - old for old, new in zip(values.shape, shape, strict=True)]
    return F.pad(values, [amount for size in reversed(missing) for amount in (0, size)])
