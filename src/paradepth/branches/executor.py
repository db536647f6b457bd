"""The interface of algorithms that evaluate branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from paradepth.depth import Stack


class BranchExecutor(ABC):
    """Evaluates branches on one input. Executors never own weights, and a trunk's result does not depend on which one
    it uses.

    An implementation must give `outputs`; it may replace `corrected` where a sum is cheaper than its terms
    (one reduction over devices, say).
    """

    @abstractmethod
    def outputs(self, branches: Sequence[Stack], x: Tensor, mask: Tensor | None = None) -> Sequence[Tensor]:
        """G_i(x) for each branch, each of the shape of `x`."""

    def corrected(self, branches: Sequence[Stack], x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x + Σ_i (G_i(x) − x), of the shape of `x`; exactly G_1(x) for one branch, and a branch that returns x adds
        exactly 0."""
        first, *rest = self.outputs(branches, x, mask)
        for g in rest:
            first = first + (g - x)
        return first
