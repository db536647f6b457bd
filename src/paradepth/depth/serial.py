"""Serial execution: one layer after another. It is the reference for every other executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from paradepth.depth.bridge import run_with_autograd, sweep
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.state import add, pack, unpack

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


class Serial(DepthExecutor):
    """x_{n+1} = x_n + h_n · F_n(x_n), n = 0 … N−1, in order.

    On a stack that is shared between processes each waits for the one before it.

    Args:
        checkpoint: store the states between layers only, and evaluate each layer again in the backward pass: memory
            for one layer's graph instead of all, for a third more time.

    >>> import torch
    >>> from paradepth.depth import Stack
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(3)], step=1 / 3)
    >>> x = torch.randn(2, 5, 16)
    >>> bool(torch.equal(stack(x, executor=Serial(checkpoint=True)), stack(x)))
    True
    """

    def __init__(self, *, checkpoint: bool = False) -> None:
        self.checkpoint = checkpoint

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        if stack.part is not None:
            return run_with_autograd(sweep, stack, x, inputs, keep=not self.checkpoint)
        single = isinstance(x, torch.Tensor)
        if not single:
            pack(x)
        for n, layer in enumerate(stack.layers):

            def advance(x: Any, *inputs: Any, layer: Any = layer, step: float = stack.step_of(n)) -> Any:
                return layer(x, *inputs, step=step) if single else _advance_tuple(layer, x, inputs, step)

            if self.checkpoint and torch.is_grad_enabled():
                y = checkpoint(advance, x, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                y = advance(x, *inputs)
            if single and y.shape != x.shape:
                raise ValueError(
                    f"layer {n} ({type(layer).__name__}) maps a state of shape {tuple(x.shape)} to {tuple(y.shape)}; a "
                    "stack's layers must keep the shape of the state"
                )
            x = y
        return x


def _advance_tuple(layer: Any, x: tuple[torch.Tensor, ...], inputs: tuple[Any, ...], step: float) -> Any:
    increment = layer.residual(x, *inputs)
    return unpack(add(tuple(x), tuple(None if f is None else step * f for f in increment)), like=x)
