"""Coarse operators: cheap stand-ins Ψ for the steps of an interval, taken one after another by the coarse solve.

For increments Δ_1 … Δ_c of an interval (Δ_i = h·F_i on the finest level):

    sample     Ψ(x) = x + c·Δ_1(x)                       one evaluation: the first layer with a c times larger step
    branch:k   k sums in a row, each over c/k increments on the same input; `branch` is k = 1, `half` is k = 2

`sample` is the operator of Layer-Parallel Training for Transformers (arXiv 2601.09026). The branch sums are this
project's: the interval as a ParaFormer's branches (arXiv 2510.15425) in place of one sampled layer. They cost c
evaluations, all of a sum independent of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from paradepth.depth.state import Increment, State, add, scaled, total

Step = Callable[[State], Increment]


class CoarseOperator(ABC):
    """A coarse step: subclass it and hand an instance to `MGRIT(coarse=…)`.

    >>> class Midpoint(CoarseOperator):
    ...     def increment(self, steps, x):
    ...         return scaled(steps[len(steps) // 2](x), len(steps))
    ...     def evaluations(self, length):
    ...         return 1
    ...     def sequential(self, length):
    ...         return 1
    """

    @abstractmethod
    def increment(self, steps: Sequence[Step], x: State) -> Increment:
        """Ψ(x) − x for an interval.

        Args:
            steps: the increments of the interval's steps, in order, at least one. The last interval of a stack may be
                shorter than the others. Increments must be linear combinations of results of `steps`, so that the
                operator also serves the (linear) adjoint.
            x: the state at the beginning of the interval.
        """

    @abstractmethod
    def evaluations(self, length: int) -> int:
        """How many steps are evaluated for an interval of `length`."""

    @abstractmethod
    def sequential(self, length: int) -> int:
        """How many of them have to wait for one another."""


@dataclass(frozen=True)
class Sample(CoarseOperator):
    """The interval's first step, with a step size as long as the interval.

    >>> Sample().evaluations(4)
    1
    """

    def increment(self, steps: Sequence[Step], x: State) -> Increment:
        return scaled(steps[0](x), float(len(steps)))

    def evaluations(self, length: int) -> int:
        return 1

    def sequential(self, length: int) -> int:
        return 1


@dataclass(frozen=True)
class BranchSum(CoarseOperator):
    """The interval in `sums` groups of steps; the steps of a group read the same input and are added up.

    With `sums` as large as the interval it is the interval itself.

    Args:
        sums: number of groups, at least 1.

    Raises:
        ValueError: `sums` below 1.

    >>> BranchSum(2).evaluations(4), BranchSum(2).sequential(4)
    (4, 2)
    """

    sums: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.sums, int) or self.sums < 1:
            raise ValueError(f"a branch sum has {self.sums!r} sums; it must have at least 1, a whole number")

    def increment(self, steps: Sequence[Step], x: State) -> Increment:
        groups = min(self.sums, len(steps))
        cuts = [len(steps) * g // groups for g in range(groups + 1)]
        done: Increment | None = None
        for start, end in pairwise(cuts):
            at = x if done is None else add(x, done)
            part = total([step(at) for step in steps[start:end]])
            done = part if done is None else total([done, part])
        assert done is not None
        return done

    def evaluations(self, length: int) -> int:
        return length

    def sequential(self, length: int) -> int:
        return min(self.sums, length)


def coarse_operator(name: str | CoarseOperator) -> CoarseOperator:
    """The operator called "sample", "branch", "half" or "branch:k", or the given one.

    Raises:
        ValueError: unknown name.

    >>> coarse_operator("half")
    BranchSum(sums=2)
    """
    if isinstance(name, CoarseOperator):
        return name
    if name == "sample":
        return Sample()
    if name == "branch":
        return BranchSum()
    if name == "half":
        return BranchSum(2)
    kind, _, count = str(name).partition(":")
    if kind == "branch" and count.isdecimal() and int(count):
        return BranchSum(int(count))
    raise ValueError(
        f"coarse is {name!r}; it must be 'sample', 'branch', 'half', 'branch:k' with a whole number k, or a "
        "CoarseOperator"
    )
