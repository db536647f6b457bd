"""The interface of algorithms that evaluate a stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


class DepthExecutor(ABC):
    """Evaluates a `Stack`. Executors never own weights: changing one changes how depth is computed, not what it
    computes.

    Attributes:
        on_several_processes: whether processes may share the layers of the stack: then `run` looks at `stack.part`.
    """

    on_several_processes: ClassVar[bool] = False

    def check(self, stack: Stack) -> None:
        """Refuses a stack that the algorithm cannot solve.

        Raises:
            ValueError: what does not fit.
        """
        return

    @property
    def unit(self) -> int:
        """The number of layers that one process has to own together: processes own whole multiples of it."""
        return 1

    @abstractmethod
    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        """The state after the last layer, differentiable with respect to `x`, `inputs` and the layers' parameters.

        Args:
            stack: layers and step sizes.
            x: the state before the first layer, a tensor or a tuple of tensors.
            inputs: what every layer gets besides the state.
        """
