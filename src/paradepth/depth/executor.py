"""The interface of algorithms that evaluate a stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


class DepthExecutor(ABC):
    """Evaluates a `Stack`. Executors never own weights: changing one changes how depth is computed, not what it
    computes."""

    @abstractmethod
    def run(self, stack: Stack, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The state after the last layer, differentiable with respect to `x`, `mask` and the layers' parameters."""
