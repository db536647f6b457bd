"""A stack in coarse steps alone: what MGRIT's first guess is, as an executor of its own.

    serial           x ─ 1 ─ 2 ─ 3 ─ 4 ─ 5 ─ 6 ─        N layers that wait for one another
    length 3         x ─ 1+2+3 ─ 4+5+6 ─                N/3 sums; the layers of a sum read the same input

Where `AsBranches` has sequences of layers side by side, this has sums of layers one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paradepth.depth.coarse import CoarseOperator, Step, coarse_operator
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.state import Increment, State, add, pack, scaled, unpack

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


class CoarseSolve(DepthExecutor):
    """Intervals of so many layers, one after another, each by one coarse step; buffers are evaluated layer by layer.

    Unlike the other executors it changes what a stack computes: with "branch" an interval x + Σ h F_i(x_{i−1}) becomes
    x + h Σ F_i(x), to first order the same. This is MGRIT's first guess at the C-points, without any iteration; it can
    be trained through.

    Args:
        length: layers of an interval, at least 1; the last one may be shorter. 1 is serial.
        coarse: coarse operator, "branch", "half", "branch:k", "sample" or a `CoarseOperator`.

    Raises:
        ValueError: a length below 1, or an unknown operator.

    Source: the coarse grid of Layer-Parallel Training for Transformers (arXiv 2601.09026), with an interval as the
    branches of Shallow Parallel Transformers with Progressive Approximation (arXiv 2510.15425).

    >>> import torch
    >>> from paradepth.depth import Stack
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(4)], step=1 / 4)
    >>> x = torch.randn(2, 5, 16)
    >>> bool(torch.allclose(stack(x, executor=CoarseSolve(length=1)), stack(x), atol=1e-6))
    True
    >>> wanted = x + sum(layer.residual(x) for layer in stack.layers) / 4
    >>> bool(torch.allclose(stack(x, executor=CoarseSolve(length=4)), wanted, atol=1e-6))
    True
    """

    def __init__(self, *, length: int, coarse: str | CoarseOperator = "branch") -> None:
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length is {length!r}; it must be a whole number of layers, at least 1")
        self.length = length
        self.coarse = coarse_operator(coarse)

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        state = pack(x)
        for start, end in intervals(stack, self.length):
            state = add(state, self.coarse.increment(steps_of(stack, range(start, end), x, inputs), state))
        return unpack(state, like=x)


def intervals(stack: Stack, length: int) -> Iterator[tuple[int, int]]:
    """First layer of each interval, and the one behind its last; a layer of a buffer is an interval of its own."""
    between = stack.between
    yield from ((n, n + 1) for n in range(between.start))
    yield from ((n, min(n + length, between.stop)) for n in between[::length])
    yield from ((n, n + 1) for n in range(between.stop, stack.depth))


def steps_of(stack: Stack, layers: Sequence[int], like: Any, inputs: tuple[Any, ...]) -> list[Step]:
    """The increments h_n · F_n of some layers, as coarse operators take them.

    Args:
        stack: has the layers.
        layers: their numbers.
        like: a state of the structure that layers take.
        inputs: what every layer gets besides the state.
    """

    def step(n: int) -> Step:
        layer, h = stack.layers[n], stack.step_of(n)

        def increment(x: State) -> Increment:
            found = layer.residual(unpack(x, like=like), *inputs)  # pyright: ignore[reportCallIssue]
            return scaled((found,) if isinstance(found, Tensor) else tuple(found), h)

        return increment

    return [step(n) for n in layers]
