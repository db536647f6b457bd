"""A stack: ordered residual layers and a step size.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from paradepth.depth.channel import Part
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.serial import Serial


class Stack(nn.Module):
    """N layers in a row, x_{n+1} = x_n + h_n · F_n(x_n).

    Args:
        layers: modules with `residual(x, *inputs)` and `forward(x, *inputs, step=…)`, at least one. The state x is a
            tensor, or a tuple of tensors (of an encoder and a decoder, say); F returns what has its structure and
            shapes.
        step: h of the layers between the buffers; 1 is the ordinary Transformer.
        buffers: numbers of first and of last layers that take h = 1 and that every executor evaluates one after
            another: the layers whose Lipschitz constants grow first in training. Source: Layer-Parallel Training for
            Transformers (arXiv 2601.09026).
        executor: how the stack is evaluated; `Serial` by default. Also an attribute that may be set later.

    Raises:
        ValueError: no layers, a step that is not positive, or buffers that leave nothing between them.

    >>> import torch
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(5)], step=1 / 3, buffers=(1, 1))
    >>> stack(torch.randn(2, 5, 16)).shape, stack.step_of(0), round(stack.step_of(2), 2)
    (torch.Size([2, 5, 16]), 1.0, 0.33)
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        step: float = 1.0,
        buffers: tuple[int, int] = (0, 0),
        executor: DepthExecutor | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("a stack needs at least one layer")
        if not isinstance(step, float | int) or not step > 0:
            raise ValueError(f"step is {step!r}; it must be positive")
        if (
            not isinstance(buffers, tuple | list)
            or len(buffers) != 2
            or min(buffers) < 0
            or (sum(buffers) >= len(self.layers) and sum(buffers))
        ):
            raise ValueError(
                f"buffers is {buffers}; it must be two numbers of layers, at least 0, that leave some of the "
                f"{len(self.layers)} layers between them"
            )
        self.step = float(step)
        self.buffer_layers = (int(buffers[0]), int(buffers[1]))
        self.executor = executor or Serial()
        self.part: Part | None = None  # the layers of this process, where a stack is shared between several

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def between(self) -> range:
        """Indices of the layers between the buffers."""
        return range(self.buffer_layers[0], self.depth - self.buffer_layers[1])

    def step_of(self, n: int) -> float:
        """h of layer `n`, counted from 0."""
        return self.step if n in self.between else 1.0

    def forward(self, x: Any, *inputs: Any, executor: DepthExecutor | None = None) -> Any:
        """The state after the last layer, of the structure and shape of `x`.

        Args:
            x: the state before the first layer, (B, T, D).
            inputs: what every layer gets besides the state: an attention mask, the memory of an encoder.
            executor: replaces the stack's own for this call.

        Raises:
            ValueError: the layers are shared between processes, and the executor evaluates whole stacks only.
        """
        chosen = executor or self.executor
        if self.part is not None and not chosen.on_several_processes:
            raise ValueError(
                f"{type(chosen).__name__} evaluates whole stacks, and this one is shared between processes; take "
                "Serial, MGRIT or Picard there"
            )
        return chosen.run(self, x, *inputs)

    def zero_output_(self) -> None:
        """Makes every layer the identity until it is trained (its output projections become zero)."""
        for layer in self.layers:
            layer.zero_output_()  # pyright: ignore[reportCallIssue]

    def flops(self, tokens: Any) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        return sum(layer.flops(tokens) for layer in self.layers)  # pyright: ignore[reportCallIssue]
