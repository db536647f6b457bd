"""How far a serial stack is from its own branch sum: the first-order Taylor view of depth.

    serial        X_N = x + Σ h F_i(X_{i−1})          layer i reads what the ones before it made
    branch sum    X_N ≈ x + h Σ F_i(x)                every layer reads x

An interval of c layers in the place of the whole stack is the coarse operator `branch` of `MGRIT(coarsening=c)`; its
error there is what the first guess starts with.

Source: Shallow Parallel Transformers with Progressive Approximation (arXiv 2510.15425) and Layer-Parallel Training for
Transformers (arXiv 2601.09026).

Shapes: B batch, T tokens, D width, N layers, … the shape of logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.branches import Branches, Loop
from paradepth.branches.branches import stacks_of
from paradepth.depth import CoarseOperator, CoarseSolve, DepthExecutor, Stack, coarse_operator
from paradepth.depth.coarse_solve import intervals, steps_of
from paradepth.depth.state import State, add, pack, squared_norm, subtract


@dataclass(frozen=True)
class IntervalDistance:
    """One interval of a stack by a coarse step, from the exact state before it.

    Attributes:
        start: its first layer, counted from 0.
        length: c, its layers.
        increment: ‖Ψ(x) − Φ(x)‖ / ‖Φ(x) − x‖: the error relative to what the interval adds.
        state: ‖Ψ(x) − Φ(x)‖ / ‖Φ(x)‖: the error relative to the state behind it.
    """

    start: int
    length: int
    increment: float
    state: float


@dataclass(frozen=True)
class FirstGuess:
    """All intervals of one length by coarse steps, one after another: what MGRIT starts its iterations with.

    Attributes:
        layers: number of layers before each C-point.
        local: ‖Ψ(x_{j−1}) − x_j‖ / ‖x_j‖, the error that the interval before C-point j makes by itself.
        predicted: ‖Σ_{i≤j} (Ψ(x_{i−1}) − x_i)‖ / ‖x_j‖, these errors added up, as if no layer changed what comes in.
        measured: ‖u_j − x_j‖ / ‖x_j‖, the error of the first guess u_j.
    """

    layers: tuple[int, ...]
    local: tuple[float, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


@dataclass(frozen=True)
class OutputDistance:
    """A model whose intervals of one length are replaced by coarse steps throughout, against the model itself.

    Attributes:
        length: c, layers of an interval.
        logits: ‖difference‖ / ‖logits‖ over the batch.
        divergence: mean KL(model ‖ replaced) of what the logits say, in nats.
        agreement: part of the predictions that are the same class.
    """

    length: int
    logits: float
    divergence: float
    agreement: float


def interval_lengths(layers: int) -> list[int]:
    """1, 2, 4 … and the number of layers itself.

    >>> interval_lengths(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({1 << k for k in range(layers.bit_length()) if 1 << k <= layers} | {layers})


@torch.no_grad()
def interval_distances(
    stack: Stack,
    x: Any,
    *inputs: Any,
    lengths: Sequence[int] | None = None,
    coarse: str | CoarseOperator = "branch",
    counted: Tensor | None = None,
    states: Sequence[State] | None = None,
) -> list[IntervalDistance]:
    """The error of a coarse step in the place of every interval of some lengths, at every start.

    An interval of one layer is exact with every operator. Halving h halves `increment` and quarters `state`, once h is
    small.

    Args:
        stack: any stack, of layers of other libraries too; in evaluation mode, or its dropout counts as an error.
        x: the state before the first layer, (B, T, D) or a tuple of such.
        inputs: what every layer gets besides the state, such as an attention mask.
        lengths: of the intervals; None: 1, 2, 4 … and N.
        coarse: coarse operator: "branch", "half", "branch:k", "sample" or a `CoarseOperator`.
        counted: booleans (B, T), where tokens of a state of one tensor count and are not padding; None: everywhere.
        states: what `exact_states` gives, where it is known already; None: it is evaluated.

    Returns:
        One entry for each length and start, lengths in order.

    Raises:
        ValueError: lengths that the stack does not have, an unknown operator, or a stack of several processes.

    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(4)], step=1 / 4)
    >>> found = interval_distances(stack, torch.randn(2, 5, 16))
    >>> [(d.length, d.start) for d in found if d.length > 1], max(d.state for d in found if d.length == 1) < 1e-6
    ([(2, 0), (2, 1), (2, 2), (4, 0)], True)
    """
    operator = coarse_operator(coarse)
    wanted = _checked(lengths, stack.depth)
    _check_counted(counted, x)
    states = _known(states, stack, x, *inputs)
    found = []
    for length in wanted:
        for start in range(stack.depth - length + 1):
            before, behind = states[start], states[start + length]
            steps = steps_of(stack, range(start, start + length), x, inputs)
            error = _size(subtract(add(before, operator.increment(steps, before)), behind), counted)
            added = _size(subtract(behind, before), counted)
            found.append(IntervalDistance(start, length, _part(error, added), _part(error, _size(behind, counted))))
    return found


@torch.no_grad()
def first_guess(
    stack: Stack,
    x: Any,
    *inputs: Any,
    length: int,
    coarse: str | CoarseOperator = "branch",
    counted: Tensor | None = None,
    states: Sequence[State] | None = None,
) -> FirstGuess:
    """The first guess of `MGRIT(coarsening=length, coarse=coarse)` at its C-points, beside what the errors of its
    intervals predict.

    The last state is counted as a C-point too, although MGRIT relaxes the last interval. Layers of a buffer are exact
    steps, and no C-points.

    Args:
        stack, x, inputs, coarse, counted, states: as for `interval_distances`.
        length: c.

    Raises:
        ValueError: as there.

    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(6)], step=1 / 6)
    >>> guess = first_guess(stack, torch.randn(2, 5, 16), length=2)
    >>> guess.layers, guess.local[0] == guess.predicted[0] == guess.measured[0]
    ((2, 4, 6), True)
    """
    operator = coarse_operator(coarse)
    _checked([length], stack.depth)
    _check_counted(counted, x)
    states = _known(states, stack, x, *inputs)
    guess, errors = states[0], tuple(torch.zeros_like(part) for part in states[0])
    rows: list[tuple[int, float, float, float]] = []
    for start, end in intervals(stack, length):
        steps = steps_of(stack, range(start, end), x, inputs)
        local = subtract(add(states[start], operator.increment(steps, states[start])), states[end])
        guess, errors = add(guess, operator.increment(steps, guess)), add(errors, local)
        if start in stack.between:
            size = _size(states[end], counted)
            misses = (local, errors, subtract(guess, states[end]))
            local_part, predicted_part, measured_part = (_part(_size(miss, counted), size) for miss in misses)
            rows.append((end, local_part, predicted_part, measured_part))
    layers, local_errors, predicted, measured = zip(*rows, strict=True)
    return FirstGuess(layers, local_errors, predicted, measured)


@torch.no_grad()
def output_distances(
    model: Any,
    inputs: Any,
    *,
    lengths: Sequence[int] | None = None,
    coarse: str | CoarseOperator = "branch",
) -> list[OutputDistance]:
    """How a model's logits change when the intervals of its stack are replaced by coarse steps throughout.

    Of a model with branches the intervals of every branch are replaced. Buffers stay as they are.

    Args:
        model: of any task, an encoder of transformers too; in evaluation mode.
        inputs: what it takes.
        lengths: of the intervals; None: 1, 2, 4 … and the number of layers of the stack or of the deepest branch.
        coarse: coarse operator, as for `interval_distances`.

    Raises:
        ValueError: lengths that no stack has, or an unknown operator.

    >>> from paradepth import create_model
    >>> model = create_model("vit_nano", image_size=8, patch_size=4, depth=3, step=1 / 3).eval()
    >>> distances = output_distances(model, torch.rand(4, 3, 8, 8))
    >>> [d.length for d in distances], distances[0].agreement
    ([1, 2, 3], 1.0)
    """
    wanted = _checked(lengths, max(stack.depth for stack in stacks_of(model.trunk)))
    exact = model(inputs).double()
    found = []
    for length in wanted:
        with evaluated_by(model.trunk, CoarseSolve(length=length, coarse=coarse)):
            other = model(inputs).double()
        divergence = F.kl_div(
            F.log_softmax(other, dim=-1), F.log_softmax(exact, dim=-1), log_target=True, reduction="none"
        )
        found.append(
            OutputDistance(
                length=length,
                logits=_part(float((other - exact).norm()), float(exact.norm())),
                divergence=max(float(divergence.sum(dim=-1).mean()), 0.0),
                agreement=float((other.argmax(dim=-1) == exact.argmax(dim=-1)).double().mean()),
            )
        )
    return found


@torch.no_grad()
def exact_states(stack: Stack, x: Any, *inputs: Any) -> list[State]:
    """The N + 1 states of serial depth, each as a tuple of tensors."""
    states = [pack(x)]
    for step in steps_of(stack, range(stack.depth), x, inputs):
        states.append(add(states[-1], step(states[-1])))
    return states


def _known(states: Sequence[State] | None, stack: Stack, x: Any, *inputs: Any) -> Sequence[State]:
    if states is None:
        return exact_states(stack, x, *inputs)
    if len(states) != stack.depth + 1:
        raise ValueError(f"there are {len(states)} states; {stack.depth} layers have {stack.depth + 1}")
    return states


@contextmanager
def evaluated_by(trunk: Stack | Branches, executor: DepthExecutor) -> Iterator[None]:
    """Has the stacks of a trunk evaluated by an executor as long as the context lasts.

    >>> from paradepth import create_model
    >>> model = create_model("vit_nano", image_size=8, patch_size=4, depth=2)
    >>> with evaluated_by(model.trunk, CoarseSolve(length=2)):
    ...     type(model.trunk.executor).__name__
    'CoarseSolve'
    >>> type(model.trunk.executor).__name__
    'Serial'
    """
    stacks = stacks_of(trunk)
    before = [stack.executor for stack in stacks]
    loop = trunk.executor if isinstance(trunk, Branches) else None
    try:
        if isinstance(trunk, Branches):
            trunk.executor = Loop()  # others evaluate layers by themselves
        for stack in stacks:
            stack.executor = executor
        yield
    finally:
        for stack, own in zip(stacks, before, strict=True):
            stack.executor = own
        if isinstance(trunk, Branches):
            trunk.executor = loop  # pyright: ignore[reportAttributeAccessIssue]


def _checked(lengths: Sequence[int] | None, layers: int) -> list[int]:
    wanted = interval_lengths(layers) if lengths is None else list(lengths)
    wrong = [length for length in wanted if not isinstance(length, int) or not 1 <= length <= layers]
    if wrong or not wanted:
        raise ValueError(
            f"lengths are {wanted}; they must be whole numbers between 1 and {layers}, the layers there are"
        )
    return wanted


def _check_counted(counted: Tensor | None, x: Any) -> None:
    if counted is not None and (not isinstance(x, Tensor) or counted.shape != x.shape[: counted.dim()]):
        raise ValueError(
            "counted says which tokens (B, T) of a state (B, T, D) count; this state is not one tensor of such a shape"
        )


def _size(x: State, counted: Tensor | None) -> float:
    """‖x‖, of the tokens that count."""
    if counted is not None:
        x = tuple(part[counted] for part in x)
    return float(squared_norm(x).sqrt())


def _part(error: float, size: float) -> float:
    return error / size if size > 0 else 0.0
