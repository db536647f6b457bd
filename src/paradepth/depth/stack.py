"""A stack: ordered residual layers and a step size.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from paradepth.depth.executor import DepthExecutor
from paradepth.depth.serial import Serial


class Stack(nn.Module):
    """N layers in a row, x_{n+1} = x_n + h · F_n(x_n).

    Args:
        layers: modules with `residual(x, mask)` and `forward(x, mask, step=…)`, at least one.
        step: h; 1 is the ordinary Transformer.

    Raises:
        ValueError: no layers, or a step that is not positive.

    >>> import torch
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(3)], step=1 / 3)
    >>> stack(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, layers: Iterable[nn.Module], *, step: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("a stack needs at least one layer")
        if not step > 0:
            raise ValueError(f"step is {step}; it must be positive")
        self.step = float(step)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, *, executor: DepthExecutor | None = None) -> Tensor:
        """The state after the last layer, (B, T, D), computed by `executor` (default: serial)."""
        return (executor or _SERIAL).run(self, x_BTD, mask)

    def zero_output_(self) -> None:
        """Makes every layer the identity until it is trained (its output projections become zero)."""
        for layer in self.layers:
            layer.zero_output_()  # pyright: ignore[reportCallIssue]

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        return sum(layer.flops(tokens) for layer in self.layers)  # pyright: ignore[reportCallIssue]


_SERIAL = Serial()
