"""What stacks, executors and cuts refuse: each time with what is wrong, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from depth_helpers import D, Encode, Residual, Toy, tokens, toys
from paradepth.depth import (
    MGRIT,
    AsBranches,
    BranchSum,
    CoarseSolve,
    DepthExecutor,
    Part,
    Picard,
    Serial,
    Stack,
    cut_into_parts,
)


class Narrows(Residual):
    """A layer whose F has another shape than its input."""

    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        return x[..., :1]


class Widens(Residual):
    """A layer whose F would widen the state by broadcasting."""

    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        return torch.stack([x, x])


class Single(Residual):
    """A layer that returns one part of a state of two."""

    def residual(self, x: tuple[Tensor, Tensor], *inputs: Any) -> Tensor:
        return x[0]


def on(count: int, executor: DepthExecutor, x: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: toys(count, **options)(tokens() if x is None else x, executor=executor)


def cut(bounds: tuple[int, ...], executor: DepthExecutor) -> None:
    stack = toys(12, buffers=(1, 0))
    stack.part = Part(bounds)
    stack(tokens(), executor=executor)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: MGRIT(forward_iterations=-1), r"forward_iterations is -1; .* at least 0, or 'serial'"),
    (lambda: MGRIT(backward_iterations="parallel"), r"backward_iterations is 'parallel'; .*'serial'"),  # pyright: ignore[reportArgumentType]
    (lambda: MGRIT(forward_iterations=1.5), r"forward_iterations is 1.5; .*whole number"),  # pyright: ignore[reportArgumentType]
    (lambda: MGRIT(forward_iterations=True), r"forward_iterations is True; .*whole number"),
    (lambda: MGRIT(tolerance=0.0), r"tolerance is 0.0; it must be positive, or None"),
    (lambda: MGRIT(tolerance=float("nan")), r"tolerance is nan; it must be positive"),
    (lambda: MGRIT(levels=1), r"levels is 1; it must be at least 2"),
    (lambda: MGRIT(levels=2.0), r"levels is 2.0; it must be at least 2"),  # pyright: ignore[reportArgumentType]
    (lambda: MGRIT(coarsening=1), r"coarsening is 1; .*at least 2"),
    (lambda: MGRIT(levels=3, coarsening=(4, 0)), r"coarsening is \(4, 0\); .*at least 2"),
    (lambda: MGRIT(coarsening=2.0), r"coarsening is 2.0; .*whole number"),  # pyright: ignore[reportArgumentType]
    (lambda: MGRIT(coarsening=(2, 2)), r"coarsening has 2 values; with 2 levels it takes one or 1"),
    (lambda: MGRIT(relaxation="FC"), r"relaxation is 'FC'; it must be 'F' or 'FCF'"),  # pyright: ignore[reportArgumentType]
    (lambda: MGRIT(levels=4, relaxation=["F", "FCF"]), r"relaxation has 2 values; with 4 levels it takes one or 3"),
    (lambda: MGRIT(cycle="W"), r"cycle is 'W'; it must be 'V' or 'F'"),  # pyright: ignore[reportArgumentType]
    (lambda: MGRIT(initial="zero"), r"initial is 'zero'; it must be 'coarse', 'previous' or 'constant'"),  # pyright: ignore[reportArgumentType]
    *(
        (
            lambda name=name: MGRIT(coarse=name),
            rf"coarse is '{name}'; it must be 'sample', 'branch', 'half', 'branch:k'",
        )
        for name in ("mean", "branch:0", "branch:-1", "branch:x", "branch:", "sample:2", "")
    ),
    (lambda: BranchSum(0), r"has 0 sums; it must have at least 1"),
    (lambda: Picard(forward_iterations=0), r"at least 1 sweep in each direction, or 'serial'"),
    (lambda: Picard(initial="coarse"), r"initial is 'coarse'; it must be 'constant' or 'previous'"),  # pyright: ignore[reportArgumentType]
    (lambda: Picard(chunk=0), r"chunk is 0; it must be a whole number, at least 1, or None"),
    (lambda: Picard(chunk=2.0), r"chunk is 2.0; it must be a whole number"),  # pyright: ignore[reportArgumentType]
    (lambda: Picard(chunk=2, tolerance=0.1), r"tolerance is of all layers together; it does not go with chunk"),
    (lambda: Stack([]), r"at least one layer"),
    *((lambda h=h: Stack([Toy()], step=h), rf"step is {h}; it must be positive") for h in (0.0, -1.0, float("nan"))),
    *(
        (lambda b=b: toys(4, buffers=b), r"buffers is \(.*\); it must be two numbers of layers, .* the 4 layers")
        for b in ((-1, 0), (2, 2), (0, 4), (1,), (1, 1, 1))
    ),
    (on(4, MGRIT(coarsening=4)), r"coarsening 4 makes one interval of the 4 layers between .* use a smaller"),
    (on(9, MGRIT(coarsening=4), buffers=(3, 2)), r"coarsening 4 makes one interval of the 4 layers between"),
    (on(8, MGRIT(coarsening=4, levels=3)), r"coarsening 4 makes one interval of the 2 steps of level 1.* fewer levels"),
    *(
        (on(6, executor, x), rf"a stack's state is {kind}.*; it must be a floating-point tensor or a tuple of such")
        for executor in (Picard(), MGRIT())
        for x, kind in (
            (torch.ones(2, D, dtype=torch.int64), "a tensor of torch.int64"),
            ("x", "a str"),
            ((), "tuple of"),
            ((torch.ones(2, D), None), "tuple of .*'a NoneType'"),
        )
    ),
    *(
        (
            lambda executor=executor: Stack([Toy(), *(Narrows() for _ in range(5))]).double()(
                tokens(), executor=executor
            ),
            r"layer \d \(Narrows\) maps a state of shapes \[\(2, 3, 4\)\] to \[\(2, 3, 1\)\]; .*must keep the shape",
        )
        for executor in (MGRIT(coarsening=2), Picard(recompute=False))
    ),
    *(
        (
            lambda executor=executor: Stack([Toy(), Toy(), Widens(), Toy()]).double()(tokens(), executor=executor),
            r"layer 2 \(Widens\) maps a state of shapes? .*2, 3, 4.* to .*2, 2, 3, 4.*; .*must keep the shape",
        )
        for executor in (Serial(), Serial(checkpoint=True), MGRIT(coarsening=2), Picard())
    ),
    *(
        (
            lambda executor=executor: Stack([Encode(), Single(), Encode(), Single()]).double()(
                (tokens(), tokens()), executor=executor
            ),
            r"layer \d \(Single\) maps a state of shapes \[\(2, 3, 4\), \(2, 3, 4\)\] to \[\(2, 3, 4\)\]; .*must keep",
        )
        for executor in (MGRIT(coarsening=2), Picard())
    ),
    (lambda: cut((0, 4, 12), MGRIT(coarsening=2)), r"cut over processes at layer 4, inside an interval of 2 layers"),
    (lambda: cut((0, 7, 12), Picard(chunk=4)), r"cut over processes at layer 7, inside a chunk of 4 layers"),
    (lambda: cut_into_parts(8, unit=4, ranks=3), r"3 processes cannot share 8 layers in intervals of 4: there are 2"),
    (lambda: cut_into_parts(9, buffers=(1, 2), unit=4, ranks=3), r"3 processes cannot share 6 layers"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_refused_in_words(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@given(
    depth=st.integers(1, 60),
    unit=st.integers(1, 9),
    ranks=st.integers(1, 9),
    buffers=st.tuples(*[st.integers(0, 3)] * 2),
)
def test_parts_are_whole_intervals_and_alike(depth: int, unit: int, ranks: int, buffers: tuple[int, int]) -> None:
    intervals = -(-depth // unit)
    if ranks > intervals:
        with pytest.raises(ValueError, match=f"{ranks} processes cannot share {depth} layers"):
            cut_into_parts(depth + sum(buffers), buffers=buffers, unit=unit, ranks=ranks)
        return
    bounds = cut_into_parts(depth + sum(buffers), buffers=buffers, unit=unit, ranks=ranks)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, depth + sum(buffers), ranks + 1)
    inner = [0, *(bound - buffers[0] for bound in bounds[1:-1]), depth]
    assert all(bound % unit == 0 for bound in inner[:-1])
    sizes = [-(-(b - a) // unit) for a, b in pairwise(inner)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "executor", [AsBranches(2), CoarseSolve(length=2)], ids=lambda executor: type(executor).__name__
)
def test_what_evaluates_whole_stacks_refuses_one_that_processes_share(executor: DepthExecutor) -> None:
    stack = toys(4)
    assert stack(tokens(), executor=executor).shape == tokens().shape
    stack.part = Part((0, 4))
    with pytest.raises(ValueError, match=f"{type(executor).__name__} evaluates whole stacks"):
        stack(tokens(), executor=executor)
