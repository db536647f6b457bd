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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paradepth.depth.state import Increment, State, add, scaled, total

Step = Callable[[State], Increment]
Rounds = Generator[list[tuple[int, State]], list[Increment], Increment]
"""Yields the steps of an interval to be evaluated next, by index, each with its state; is sent their increments; and
returns Ψ(x) − x. Those of one round do not wait for one another."""


class CoarseOperator(ABC):
    """A coarse step: subclass it and hand an instance to `MGRIT(coarse=…)`, or give it a name with
    `register_coarse_operator`.

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

    def rounds(self, length: int, x: State) -> Rounds | None:
        """The same as `increment`, in a form that lets the steps of a round, and those of many intervals, be evaluated
        at once; None where an operator has no such form. A subclass that has its own `increment` needs its own
        `rounds`, or has none.

        Args:
            length: number of steps of the interval.
            x: the state at its beginning.
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "increment" in vars(cls) and "rounds" not in vars(cls):
            cls.rounds = CoarseOperator.rounds  # inherited rounds would be those of another operator

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
        return _one_by_one(self.rounds(len(steps), x), steps)

    def rounds(self, length: int, x: State) -> Rounds:
        (first,) = yield [(0, x)]
        return scaled(first, float(length))

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
        return _one_by_one(self.rounds(len(steps), x), steps)

    def rounds(self, length: int, x: State) -> Rounds:
        groups = min(self.sums, length)
        cuts = [length * g // groups for g in range(groups + 1)]
        done: Increment | None = None
        for start, end in pairwise(cuts):
            at = x if done is None else add(x, done)
            part = total((yield [(i, at) for i in range(start, end)]))
            done = part if done is None else total([done, part])
        assert done is not None
        return done

    def evaluations(self, length: int) -> int:
        return length

    def sequential(self, length: int) -> int:
        return min(self.sums, length)


def _one_by_one(rounds: Rounds, steps: Sequence[Step]) -> Increment:
    try:
        wanted = next(rounds)
        while True:
            wanted = rounds.send([steps[i](x) for i, x in wanted])
    except StopIteration as end:
        return end.value


def coarse_increments(
    operator: CoarseOperator,
    intervals: Sequence[tuple[int, State]],
    evaluate: Callable[[Sequence[tuple[int, int, State]]], list[Increment]],
) -> list[Increment]:
    """Ψ(x) − x of several intervals, their rounds in step.

    Args:
        operator: the same for all.
        intervals: the length of each and the state at its beginning.
        evaluate: increments for a list of (interval, step within it, state).
    """
    found: dict[int, Increment] = {}
    running: dict[int, tuple[Rounds, list[tuple[int, State]]]] = {}
    for k, (length, x) in enumerate(intervals):
        rounds = operator.rounds(length, x)
        if rounds is None:
            steps = [lambda x, k=k, i=i: evaluate([(k, i, x)])[0] for i in range(length)]
            found[k] = operator.increment(steps, x)
        else:
            running[k] = rounds, next(rounds)
    while running:
        increments = iter(evaluate([(k, i, x) for k, (_, wanted) in running.items() for i, x in wanted]))
        for k, (rounds, wanted) in list(running.items()):
            try:
                running[k] = rounds, rounds.send([next(increments) for _ in wanted])
            except StopIteration as end:
                found[k] = end.value
                del running[k]
    return [found[k] for k in range(len(intervals))]


COARSE_OPERATORS: dict[str, CoarseOperator] = {"sample": Sample(), "branch": BranchSum(), "half": BranchSum(2)}
"""Coarse operators by name; `branch:k` is understood besides."""


def register_coarse_operator(name: str, operator: CoarseOperator) -> None:
    """Makes an operator of your own known by name: to `MGRIT(coarse=…)`, and so to training and the command line.

    Raises:
        ValueError: the name is taken, or looks like `branch:k`.

    >>> register_coarse_operator("half", BranchSum(2))
    Traceback (most recent call last):
    ...
    ValueError: there is a coarse operator 'half' already; take another name
    """
    if name in COARSE_OPERATORS or name.startswith("branch:"):
        raise ValueError(f"there is a coarse operator {name!r} already; take another name")
    COARSE_OPERATORS[name] = operator


def coarse_operator(name: str | CoarseOperator) -> CoarseOperator:
    """The operator called "sample", "branch", "half", "branch:k" or as it was registered, or the given one.

    Raises:
        ValueError: unknown name.

    >>> coarse_operator("half")
    BranchSum(sums=2)
    """
    if isinstance(name, CoarseOperator):
        return name
    if isinstance(name, str) and name in COARSE_OPERATORS:
        return COARSE_OPERATORS[name]
    kind, _, count = str(name).partition(":")
    if kind == "branch" and count.isdecimal() and int(count):
        return BranchSum(int(count))
    raise ValueError(
        f"coarse is {name!r}; it must be {', '.join(map(repr, COARSE_OPERATORS))}, 'branch:k' with a whole number k, "
        "or a CoarseOperator"
    )
