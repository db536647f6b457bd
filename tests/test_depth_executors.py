"""The depth executors in one process: equal to serial at convergence, and what they store."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depth_helpers import (
    D,
    Decode,
    Encode,
    Linear,
    Midpoint,
    Reads,
    Toy,
    equals_serial,
    every_executor,
    exact,
    loss_of,
    outcome,
    same,
    tokens,
    toys,
)
from paradepth.depth import MGRIT, DepthExecutor, Picard, Serial, Stack
from paradepth.nn import EncoderLayer, set_dropout_key

COARSE = ("sample", "branch", "half", "branch:3", Midpoint())
EVERY = pytest.mark.parametrize("executor", every_executor(), ids=lambda e: f"{type(e).__name__}-{e.recompute}")


# ---- equal to serial at convergence: values and all gradients ------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
def test_serial_is_the_loop(checkpoint: bool) -> None:
    stack, x = toys(6, step=0.3, buffers=(1, 2)), tokens()
    layers: list[Any] = list(stack.layers)
    expected: Tensor = x
    for f, h in zip(layers, (1.0, 0.3, 0.3, 0.3, 1.0, 1.0)):
        expected = expected + h * f.residual(expected)
    wanted = [x, *stack.parameters()]
    y = stack(x, executor=Serial(checkpoint=checkpoint))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(loss_of(v), wanted) for v in (y, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("levels", "cycle"), [(2, "V"), (3, "V"), (3, "F")])
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("coarse", COARSE, ids=lambda c: c if isinstance(c, str) else type(c).__name__)
def test_mgrit_is_serial(coarse: Any, relaxation: Any, levels: int, cycle: Any, recompute: bool) -> None:
    options = {"levels": levels, "coarse": coarse, "relaxation": relaxation, "cycle": cycle, "recompute": recompute}
    needed = 6 if relaxation == "F" else 3  # intervals of the 11 layers between the buffers, c = 2
    mgrit = exact(**options, forward_iterations=needed, backward_iterations=needed)
    equals_serial(toys(14, step=0.3, buffers=(1, 2)), mgrit, tokens())


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_picard_is_serial_after_as_many_sweeps_as_layers_of_a_chunk(chunk: int | None) -> None:
    sweeps = min(chunk or 7, 7)
    stack, x = toys(9, step=0.4, buffers=(2, 0)), tokens()
    for recompute in (True, False):
        options: dict = {"chunk": chunk, "recompute": recompute}
        equals_serial(stack, Picard(forward_iterations=sweeps, backward_iterations=sweeps, **options), x)
    if sweeps > 1:
        early = Picard(forward_iterations=sweeps - 1, backward_iterations=sweeps, chunk=chunk)
        assert not torch.allclose(stack(x, executor=early), stack(x), rtol=0, atol=1e-8)


@EVERY
@pytest.mark.parametrize("serial", ["forward_iterations", "backward_iterations"])
def test_one_direction_may_be_serial(executor: Any, serial: str) -> None:
    stack, x = toys(7, step=0.5), tokens()
    kind, iterations = type(executor), {"forward_iterations": 1, "backward_iterations": 9, serial: "serial"}
    mixed = kind(recompute=executor.recompute, **iterations)
    result, expected = outcome(stack, mixed, x), outcome(stack, Serial(), x)
    if serial == "forward_iterations":
        same(result, expected)
        assert mixed.report.forward.iterations is None
        assert mixed.report.forward.residuals == []
        assert mixed.report.forward.evaluations == 7
    else:
        assert mixed.report.backward.iterations is None
        assert mixed.report.backward.evaluations == 7
        same(outcome(stack, kind(recompute=executor.recompute, **{**iterations, "forward_iterations": 9}), x), expected)


@pytest.mark.parametrize("executor", [*every_executor(), Serial(checkpoint=True)], ids=lambda e: type(e).__name__)
class TestEveryExecutorIsSerial:
    """With what layers, inputs and parameters may be."""

    def test_dropout_draws_one_mask(self, executor: DepthExecutor) -> None:
        stack, x = Stack([Toy(dropout=0.3) for _ in range(6)], step=0.4).double().train(), tokens()
        values = []
        for number in (1, 2):
            set_dropout_key(stack, seed=1, step=number)
            equals_serial(stack, executor, x)
            values.append(stack(x, executor=executor))
        assert not torch.allclose(*values)

    def test_encoder_layers_with_a_mask(self, executor: DepthExecutor) -> None:
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        layers = [EncoderLayer(8, heads=2, mlp=9 + n, dropout=0.2, attention_dropout=0.1) for n in range(6)]
        stack = Stack(layers, step=0.5, buffers=(1, 0)).double().train()
        x = tokens(2, 5, 8)
        equals_serial(stack, executor, x, mask)
        assert not torch.allclose(stack(x, mask, executor=executor), stack(x, executor=executor))

    def test_side_inputs_get_gradients(self, executor: DepthExecutor) -> None:
        stack = Stack([Reads() for _ in range(7)], step=0.5, buffers=(1, 1)).double()
        memory, scale, mask = tokens(), tokens(D), torch.rand(2, 3, D) > 0.3
        equals_serial(stack, executor, tokens(), memory, scale, mask)
        equals_serial(stack, executor, tokens(), memory.detach(), scale)  # the first tensor needs none
        equals_serial(stack, executor, tokens(grad=False), memory, 0.5, mask)
        equals_serial(stack, executor, tokens(), (a := tokens(D)), a)  # one tensor in two places
        derived = tokens().exp()  # not a leaf
        equals_serial(stack, executor, derived, derived)  # state and side input at once

    def test_tuple_states(self, executor: DepthExecutor) -> None:
        stack = Stack([Encode() for _ in range(3)] + [Decode() for _ in range(4)], step=0.4, buffers=(1, 1)).double()
        x, y = tokens(2, 3, D), tokens(2, 2, D + 1)
        equals_serial(stack, executor, (x, y))
        equals_serial(stack, executor, (x, y.detach()))
        first = stack((x, y), executor=executor)[0]  # the other part of the result is not used
        expected = stack((x, y), executor=Serial())[0]
        torch.testing.assert_close(
            *(torch.autograd.grad(loss_of(v), x)[0] for v in (first, expected)), atol=1e-10, rtol=0
        )
        reverse = Stack([Decode() for _ in range(3)] + [Encode() for _ in range(4)], step=0.4).double()
        equals_serial(reverse, executor, (x, y))

    def test_layers_of_different_classes(self, executor: DepthExecutor) -> None:
        layers = [Toy(3), Linear(), Toy(9), EncoderLayer(D, heads=2, mlp=5), Linear()]
        equals_serial(Stack(layers, step=0.4).double(), executor, tokens(grad=False))

    def test_shared_layers_and_parameters(self, executor: DepthExecutor) -> None:
        one, two, three = Toy(), Toy(), Toy()
        two.up.weight = three.up.weight
        two.out = one.out
        stack = Stack([one, two, one, three, one, two], step=0.4, buffers=(1, 0)).double()
        equals_serial(stack, executor, tokens())

    def test_frozen_layers_get_no_gradient(self, executor: DepthExecutor) -> None:
        stack = toys(6, step=0.4)
        for frozen in (stack.layers[0], stack.layers[3], stack.layers[4].up):  # pyright: ignore[reportAttributeAccessIssue]
            frozen.requires_grad_(False)
        equals_serial(stack, executor, tokens(grad=False))
        loss_of(stack(tokens(grad=False), executor=executor)).backward()
        assert [n for n, layer in enumerate(stack.layers) if all(p.grad is None for p in layer.parameters())] == [0, 3]
        equals_serial(stack.requires_grad_(False), executor, tokens())
        assert not stack(tokens(grad=False), executor=executor).requires_grad

    def test_gradients_accumulate(self, executor: DepthExecutor) -> None:
        stack, grads = toys(6, step=0.4), []
        batches = tokens(3, D, grad=False), tokens(5, D, grad=False)
        for each in (executor, Serial()):
            stack.zero_grad()
            loss_of(stack(batches[0], executor=each)).backward()
            late = [stack(batch, executor=each) for batch in batches]  # two calls before their backward passes
            (loss_of(late[0]) + loss_of(late[1])).backward()
            grads.append({name: p.grad for name, p in stack.named_parameters()})
        same(*grads)

    def test_backward_twice(self, executor: DepthExecutor) -> None:
        stack, x = toys(6, step=0.4), tokens()
        loss, wanted = loss_of(stack(x, executor=executor)), [x, *stack.parameters()]
        once = torch.autograd.grad(loss, wanted, retain_graph=True)
        for a, b in zip(once, torch.autograd.grad(loss, wanted)):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match=r"second time|already been freed"):
            torch.autograd.grad(loss, wanted)

    def test_bfloat16_autocast(self, executor: DepthExecutor) -> None:
        stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(6)], step=0.3)
        found, x = [], torch.randn(2, 5, 16)
        for each in (executor, Serial()):
            stack.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = stack(x, executor=each)
            loss_of(y).backward()  # outside of autocast, as it should be
            assert y.dtype == torch.float32
            found.append({"y": y.detach(), **{name: p.grad for name, p in stack.named_parameters()}})
        full = outcome(stack, Serial(), x)["value 0"]
        assert full is not None
        assert (found[0]["y"] - full).norm() > 1e-4 * full.norm()  # it was in low precision
        for name, expected in found[1].items():
            assert found[0][name] is not None, name
            assert (found[0][name] - expected).norm() <= 0.03 * expected.norm() + 1e-3, name


@EVERY
def test_layers_are_evaluated_again_under_the_autocast_of_their_call(executor: Any) -> None:
    seen: set[torch.dtype] = set()

    class Records(Toy):
        def residual(self, x: Tensor, *inputs: Any) -> Tensor:
            seen.add(self.up(x).dtype)
            return super().residual(x)

    stack, x = Stack([Records() for _ in range(6)], step=0.4), torch.randn(2, D)
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y = stack(x, executor=executor)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            y.sum().backward()
        assert seen == {torch.bfloat16 if inside else torch.float32}
        seen.clear()


@EVERY
def test_evaluation_without_gradients(executor: Any) -> None:
    stack, x = toys(6, step=0.4), tokens()
    expected = stack(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = stack(x, executor=executor)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-10)
    y.sum()
    assert stack(x, executor=executor).requires_grad


small = st.fixed_dictionaries(
    {
        "coarsening": st.integers(2, 5),
        "levels": st.integers(2, 4),
        "relaxation": st.sampled_from(["F", "FCF"]),
        "coarse": st.sampled_from(COARSE),
        "cycle": st.sampled_from(["V", "F"]),
        "initial": st.sampled_from(["coarse", "constant", "previous"]),
        "recompute": st.booleans(),
    }
)


@settings(max_examples=40)
@given(
    depth=st.integers(2, 15),
    options=small,
    buffers=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    shape=st.lists(st.integers(1, 3), max_size=2),
    encoder=st.booleans(),
)
def test_any_depth_and_options(depth: int, options: dict, buffers: Any, shape: list[int], encoder: bool) -> None:
    layers = [EncoderLayer(D, heads=2, mlp=5) if encoder else Linear() for _ in range(depth + sum(buffers))]
    stack = Stack(layers, step=1 / depth, buffers=buffers).double()
    intervals = -(-depth // options["coarsening"])
    iterations = intervals if options["relaxation"] == "F" else -(-intervals // 2)
    mgrit = MGRIT(**options, forward_iterations=iterations, backward_iterations=iterations)
    count = depth
    for _ in range(options["levels"] - 1):
        count = -(-count // options["coarsening"])
        if count < 2:
            with pytest.raises(ValueError, match="leaves nothing to coarsen"):
                mgrit.check(stack)
            return
    for _ in range(2 if options["initial"] == "previous" else 1):
        equals_serial(stack, mgrit, tokens(*([2, 2] if encoder else shape), D))


# ---- changes between forward and backward, derivatives of derivatives ----------------------------------------------


@EVERY
@pytest.mark.parametrize("which", ["parameter", "state", "input"])
def test_a_change_in_place_before_backward_is_refused(executor: Any, which: str) -> None:
    stack = Stack([Reads() for _ in range(6)], step=0.4).double()
    x, memory = tokens(), tokens()
    loss = loss_of(stack(x, memory, executor=executor))
    changed = {"parameter": stack.layers[3].own.bias, "state": x, "input": memory}[which]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        changed.add_(1.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- memory --------------------------------------------------------------------------------------------------------


class _Saved:
    """What autograd has saved and not yet freed."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self.peak = 0

    def __enter__(self) -> _Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *what: object) -> None:
        self.hooks.__exit__(*what)  # pyright: ignore[reportArgumentType]

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self.alive.add(kept)
        self.peak = max(self.peak, self.hidden)
        return kept

    @property
    def hidden(self) -> int:
        """Number of saved tensors inside a layer, told by their width."""
        return sum(kept.tensor.shape == (2, 3, HIDDEN) for kept in self.alive)


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output would hold the graph that holds it


HIDDEN = 37


def tensors_alive(*shape: int) -> int:
    gc.collect()
    return sum(type(o) is Tensor and o.shape == shape for o in gc.get_objects())


@pytest.mark.parametrize("make", [Serial, MGRIT, Picard])
def test_recomputing_stores_states_only(make: Callable[..., DepthExecutor]) -> None:
    stack, x = Stack([Toy(HIDDEN) for _ in range(8)], step=0.1, buffers=(1, 1)).double(), tokens()
    name = "checkpoint" if make is Serial else "recompute"
    frugal, lavish = make(**{name: True}), make(**{name: False})
    with _Saved() as saved:
        loss = loss_of(stack(x, executor=lavish))
        one = saved.hidden // 8
        assert one >= 1
        assert saved.hidden == 8 * one  # keeps a graph of each layer, and nothing of superseded evaluations
        loss.backward()
        assert saved.hidden == 0
        del loss
        assert tensors_alive(2, 3, HIDDEN) == 0
    with _Saved() as saved:
        loss = loss_of(stack(x, executor=frugal))
        assert saved.peak == 0
        assert tensors_alive(2, 3, HIDDEN) == 0
        loss.backward()
        assert saved.peak <= one  # one layer at a time
        assert saved.hidden == 0
    with _Saved() as saved, torch.no_grad():
        stack(x, executor=lavish)
        assert saved.peak == 0


@EVERY
def test_everything_goes_with_the_result(executor: Any) -> None:
    """Without waiting for the garbage collector: states are the memory of a large model."""
    stack, x = toys(6), tokens(2, 11, D)
    loss_of(stack(x, executor=executor)).backward()
    gc.collect()
    before = tensors_alive(2, 11, D)
    gc.disable()
    try:
        for _ in range(3):
            loss_of(stack(x, executor=executor)).backward()
        assert sum(type(o) is Tensor and o.shape == (2, 11, D) for o in gc.get_objects()) <= before
    finally:
        gc.enable()
