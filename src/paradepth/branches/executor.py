"""The interface of algorithms that evaluate branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from paradepth.depth import Stack
from paradepth.depth.state import add, pack, subtract, unpack


class BranchExecutor(ABC):
    """Evaluates branches on one input. Executors never own weights, and a trunk's result does not depend on which one
    it uses.

    An implementation must give `outputs`; it may replace `corrected` where a sum is cheaper than its terms
    (one reduction over devices, say).
    """

    @abstractmethod
    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Sequence[Any]:
        """G_i(x) for each branch, each of the structure and shape of `x`: a tensor or a tuple of tensors."""

    def corrected(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Any:
        """x + Σ_i (G_i(x) − x), of the structure and shape of `x`; exactly G_1(x) for one branch, and a branch that
        returns x adds exactly 0."""
        first, *rest = (pack(g) for g in self.outputs(branches, x, *inputs))
        for g in rest:
            first = add(first, subtract(g, pack(x)))
        return unpack(first, like=x)
