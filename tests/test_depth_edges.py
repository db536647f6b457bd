"""Edges of the depth executors: states that layers leave alone, nested side inputs, stale guesses, late changes."""

from __future__ import annotations

import gc
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from depth_helpers import D, Decode, Encode, Residual, Toy, every_executor, exact, loss_of, outcome, same, tokens, toys
from paradepth.depth import MGRIT, BranchSum, Picard, Serial, Stack, cut_into_parts
from paradepth.nn import set_dropout_key

EVERY = pytest.mark.parametrize("executor", every_executor(), ids=lambda e: f"{type(e).__name__}-{e.recompute}")


class Still(Residual):
    """Leaves two of three parts alone."""

    def residual(self, x: Any, *inputs: Any) -> Any:
        return None, None, torch.tanh(x[2])


class Scales(Residual):
    """Reads a tensor inside a dictionary."""

    def residual(self, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
        return torch.tanh(x) * memory["scale"]


class Broadcasts(Residual):
    """Returns one part in another shape."""

    def residual(self, x: Any, *inputs: Any) -> Any:
        return x[0].new_zeros(3, *x[0].shape), None


def encoder_decoder() -> Stack:
    return Stack([Encode() for _ in range(3)] + [Decode() for _ in range(4)], step=0.4).double()


def alive(shape: tuple[int, ...]) -> int:
    return sum(type(thing) is Tensor and thing.shape == shape for thing in gc.get_objects())


@EVERY
def test_parts_that_no_layer_changes_do_not_keep_memory(executor: Any) -> None:
    stack = encoder_decoder()
    x, y = tokens(2, 11, D), tokens(2, 2, D + 1)
    loss_of(stack((x, y), executor=executor)).backward()
    gc.collect()
    before = alive((2, 11, D))
    gc.disable()
    try:
        for _ in range(3):
            loss_of(stack((x, y), executor=executor)).backward()
        assert alive((2, 11, D)) <= before
    finally:
        gc.enable()


def test_two_unchanged_parts_are_freed_at_all() -> None:
    stack = Stack([Still() for _ in range(4)])
    z = tuple(tokens(2, 13, D) for _ in range(3))
    before = alive((2, 13, D))
    for _ in range(5):
        loss_of(stack(z, executor=Picard())).backward()
    for part in z:
        part.grad = None
    gc.collect()
    assert alive((2, 13, D)) <= before


@EVERY
def test_changing_an_unchanged_part_of_the_result_in_place_is_right(executor: Any) -> None:
    stack, x, y = encoder_decoder(), tokens(2, 3, D), tokens(2, 2, D + 1)
    found = stack((x, y), executor=executor)
    found[0].add_(1.0)
    expected = stack((x, y), executor=Serial())
    pairs = ((found[0], found[1]), (expected[0] + 1, expected[1]))
    torch.testing.assert_close(*(torch.autograd.grad(a.sum() + b.sum(), x)[0] for a, b in pairs))


@pytest.mark.parametrize("make", [MGRIT, Picard])
@pytest.mark.parametrize("after", [5, 16])
def test_a_guess_of_another_depth_is_not_used(make: Any, after: int) -> None:
    long = toys(16, step=0.1)
    stack, x = Stack(list(long.layers[:10]), step=0.1), tokens()
    executor = make(initial="previous")
    loss_of(stack(x, executor=executor)).backward()
    del stack.layers[5:]
    if after == 16:
        stack.layers.extend(list(long.layers[5:]))
    same(outcome(stack, executor, x), outcome(stack, make(), x), atol=0.0)


@pytest.mark.parametrize("make", [MGRIT, Picard])
def test_a_guess_made_in_inference_mode_is_not_used(make: Any) -> None:
    executor, stack, x = make(initial="previous", forward_iterations=1), toys(8), tokens()
    with torch.inference_mode():
        stack(x, executor=executor)
    loss_of(stack(x, executor=executor)).backward()


@pytest.mark.parametrize(
    "executor", [exact(), Picard(forward_iterations=9, backward_iterations=9), Serial(checkpoint=True)]
)
def test_another_dropout_key_before_a_recomputation_is_refused(executor: Any) -> None:
    stack, x = Stack([Toy(dropout=0.4) for _ in range(6)], step=0.3).double().train(), tokens()
    set_dropout_key(stack, seed=0, step=0)
    y = stack(x, executor=executor)
    set_dropout_key(stack, seed=0, step=1)
    with pytest.raises(RuntimeError, match=r"inplace operation|dropout key changed"):
        loss_of(y).backward()


@EVERY
def test_second_derivatives_are_refused(executor: Any) -> None:
    x = tokens()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(toys(6)(x, executor=executor).sum(), x, create_graph=True)


@pytest.mark.parametrize("executor", [exact(), Picard(forward_iterations=6, backward_iterations=6)])
def test_tensors_inside_side_inputs_get_their_gradients(executor: Any) -> None:
    stack, x, gradients = Stack([Scales() for _ in range(6)], step=0.5), tokens(grad=False), []
    for each in (Serial(), executor):
        scale = torch.linspace(-1, 1, D, dtype=torch.float64).requires_grad_()
        loss_of(stack(x, {"scale": scale}, executor=each)).backward()
        gradients.append(scale.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_serial_refuses_tuple_states_that_change_shape() -> None:
    with pytest.raises(ValueError, match="must keep the shape"):
        Stack([Broadcasts()])((tokens(), tokens()), executor=Serial())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cut_into_parts(8, ranks=0), "ranks is 0"),
        (lambda: cut_into_parts(8, ranks=-1), "ranks is -1"),
        (lambda: cut_into_parts(8, unit=0, ranks=2), "unit is 0"),
        (lambda: Picard(chunk=2, initial="previous"), "initial is 'previous'"),
        (lambda: BranchSum(1.5), "1.5 sums"),  # pyright: ignore[reportArgumentType]
        (lambda: toys(4, buffers=1), "buffers is 1"),
        (lambda: cast(Any, toys)(4, step="a"), "step is 'a'"),
        (lambda: cast(Any, MGRIT)(tolerance="a"), "tolerance is 'a'"),
        (lambda: toys(4)(torch.zeros(2, 3, D, dtype=torch.int64)), "must be a floating-point tensor"),
    ],
)
def test_more_refusals(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
