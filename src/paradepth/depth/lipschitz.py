"""How strongly each layer of a stack can stretch a change of its input: an estimate per layer.

Lipschitz constants that grow in training, first in the first and last layers, are what makes iterative executors
converge more slowly. Source: Layer-Parallel Training for Transformers (arXiv 2601.09026).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paradepth.depth.channel import Part
from paradepth.depth.state import Increment, State, add, detached, pack, scaled

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


def lipschitz(stack: Stack, x: Any, *inputs: Any, iterations: int = 20, seed: int = 0) -> list[float]:
    """‖h ∂F_n/∂x‖₂ of each layer n, at its state on the serial trajectory from `x`.

    The largest singular value, by power iteration on JᵀJ from a random vector: an estimate from below, the better the
    more iterations. The batch is one vector; layers that treat its samples independently have a block-diagonal
    Jacobian, whose norm is that of the sample with the largest one. A local value on this batch, not a bound for all
    inputs. The cost is one evaluation and about 3 · `iterations` backward passes a layer.

    Args:
        stack: layers and step sizes; evaluated in the mode they are in (dropout draws one mask a layer).
        x: the state before the first layer, a tensor or a tuple of tensors; the same on every process that shares the
            stack, all of which call this together.
        inputs: what every layer gets besides the state.
        iterations: of the power iteration, at least 1.
        seed: of the first vectors.

    Returns:
        One number a layer; 0.0 for a layer whose increment does not depend on the state.

    Raises:
        ValueError: fewer than 1 iterations.

    >>> from paradepth.depth import Stack
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(3)], step=1 / 3)
    >>> all(value > 0 for value in lipschitz(stack, torch.randn(2, 5, 16)))
    True
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    part = stack.part or Part((0, stack.depth))
    rank, last = part.channel.rank, part.channel.size - 1
    single = isinstance(x, Tensor)
    u = detached(pack(x))
    if rank > 0:
        u = part.channel.receive(u, source=rank - 1)
    estimates = torch.zeros(stack.depth, dtype=torch.float64, device=u[0].device)
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for n in part.owned:
            layer, generator = stack.layers[n], torch.Generator().manual_seed(seed + n)
            leaves = tuple(part.requires_grad_() for part in detached(u))
            f = layer.residual(leaves[0] if single else leaves, *inputs)  # pyright: ignore[reportCallIssue]
            increment = scaled((f,) if single else tuple(f), stack.step_of(n))
            estimates[n] = _norm(leaves, increment, iterations, generator)
            u = detached(add(u, increment))
    if rank < last:
        part.channel.send(u, to=rank + 1)
    part.channel.flush()
    return part.channel.sum(estimates).tolist()


def _norm(x: State, increment: Increment, iterations: int, generator: torch.Generator) -> float:
    """‖∂increment/∂x‖₂ from the graph between the two."""
    y = tuple(part for part in increment if part is not None and part.requires_grad)
    if not y:
        return 0.0
    # w ↦ Jᵀw is linear, so its derivative with respect to w, transposed, is J.
    w = tuple(torch.zeros_like(part, requires_grad=True) for part in y)
    pulled = torch.autograd.grad(y, x, w, create_graph=True, materialize_grads=True)
    if not any(part.requires_grad for part in pulled):
        return 0.0
    v = tuple(torch.randn(part.shape, generator=generator, dtype=part.dtype).to(part.device) for part in x)
    norm = 0.0
    for _ in range(iterations):
        length = _length(v)
        if length == 0.0 or not math.isfinite(length):
            return length
        v = tuple(part / length for part in v)
        pushed = _grad(pulled, w, v)
        norm = _length(pushed)
        v = _grad(y, x, pushed)
    return norm


def _grad(outputs: State, inputs: State, directions: State) -> State:
    live = [(out, part) for out, part in zip(outputs, directions, strict=True) if out.requires_grad]
    return torch.autograd.grad(
        [out for out, _ in live], inputs, [part for _, part in live], retain_graph=True, materialize_grads=True
    )


def _length(x: State) -> float:
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in x))
