"""Serial execution: one layer after another. It is the reference for every other executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from paradepth.depth.bridge import run_with_autograd, sweep
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.state import add, pack, unpack
from paradepth.nn import dropout_keys

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

    on_several_processes = True

    def __init__(self, *, checkpoint: bool = False) -> None:
        self.checkpoint = checkpoint

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        if stack.part is not None:
            return run_with_autograd(sweep, stack, x, inputs, keep=not self.checkpoint)
        pack(x)  # refuses what is no state
        again = self.checkpoint and torch.is_grad_enabled()
        for n, layer in enumerate(stack.layers):
            y = (_checkpointed if again else _advance)(layer, x, inputs, stack.step_of(n))
            if _shapes(y) != _shapes(x):
                raise ValueError(
                    f"layer {n} ({type(layer).__name__}) maps a state of shape {_shapes(x)} to {_shapes(y)}; a stack's "
                    "layers must keep the shape of the state"
                )
            x = y
        return x


def _shapes(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else [tuple(part.shape) for part in x]


def _advance(layer: Any, x: Any, inputs: tuple[Any, ...], step: float) -> Any:
    if isinstance(x, torch.Tensor):
        return layer(x, *inputs, step=step)
    increment = layer.residual(x, *inputs)
    return unpack(add(tuple(x), tuple(None if f is None else step * f for f in increment)), like=x)


def _checkpointed(layer: Any, x: Any, inputs: tuple[Any, ...], step: float) -> Any:
    drawn = _versions(layer)

    def advance(x: Any, *inputs: Any) -> Any:
        if _versions(layer) != drawn:
            raise RuntimeError(
                "a dropout key changed between the forward and the backward pass, so a layer cannot be evaluated again "
                "with the masks it had; call set_dropout_key after backward"
            )
        return _advance(layer, x, inputs, step)

    return checkpoint(advance, x, *inputs, use_reentrant=False, preserve_rng_state=False)


def _versions(layer: Any) -> list[int]:
    return [key._version for key in dropout_keys(layer)]
