"""Serial execution: one layer after another. It is the reference for every other executor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from paradepth.depth.executor import DepthExecutor

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


class Serial(DepthExecutor):
    """x_{n+1} = x_n + h · F_n(x_n), n = 0 … N−1, in order."""

    def run(self, stack: Stack, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in stack.layers:
            x = layer(x, mask, step=stack.step)
        return x
