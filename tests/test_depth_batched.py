"""Batched evaluation in the depth executors: equal to one by one in every iterate, and how many batches it takes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from depth_helpers import Midpoint, equals_serial, exact, loss_of, outcome, same, tokens, toys
from paradepth.depth import MGRIT, BranchSum, CoarseOperator, Picard, Serial, Stack
from paradepth.depth.batching import Batching, batch_layers
from paradepth.depth.chain import make_layers
from paradepth.depth.state import Increment, State, total
from paradepth.nn import EncoderLayer, SourceLayer, StackedLayers, TargetLayer, set_dropout_key

WIDTH = 8


def encoder(depth: int, *, step: float | None = None, buffers: tuple[int, int] = (0, 0), **options: Any) -> Stack:
    layers = [EncoderLayer(WIDTH, heads=2, mlp=12, **options) for _ in range(depth)]
    return ready(Stack(layers, step=step or 2 / depth, buffers=buffers))


def joined(source: int, target: int, **options: Any) -> Stack:
    layers: list[nn.Module] = [SourceLayer(WIDTH, heads=2, mlp=12, **options) for _ in range(source)]
    layers += [TargetLayer(WIDTH, heads=2, mlp=12, **options) for _ in range(target)]
    return ready(Stack(layers, step=0.3))


def ready(stack: Stack) -> Stack:
    """In float64, with norms, biases and dropout keys that differ from layer to layer."""
    for parameter in stack.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    set_dropout_key(stack, seed=2, step=5)
    return stack.double()


def state(*, pair: bool = False) -> Any:
    x = tokens(2, 3, WIDTH)
    return (x, tokens(2, 4, WIDTH)) if pair else x


def keys(count: int = 3) -> Tensor:
    """A mask of keys; every query sees the first."""
    mask = torch.rand(2, 1, 1, count) < 0.6
    mask[..., 0] = True
    return mask


def equals_one_by_one(stack: Stack, options: dict[str, Any], x: Any, *inputs: Any, kind: Any = MGRIT) -> Any:
    """Asserts equal values, gradients, residuals and evaluations; returns the report."""
    plain, batched = kind(**options), kind(**options, batched=True)
    same(outcome(stack, batched, x, *inputs), outcome(stack, plain, x, *inputs))
    one_is_serial = (plain.forward_iterations == "serial") != (plain.backward_iterations == "serial")
    if one_is_serial and not plain.recompute:  # then there is nothing to keep, and less to look at
        return batched.report
    for found, expected in (
        (batched.report.forward, plain.report.forward),
        (batched.report.backward, plain.report.backward),
    ):
        assert (found.iterations, found.evaluations) == (expected.iterations, expected.evaluations)
        assert found.residuals == pytest.approx(expected.residuals, rel=1e-7, abs=1e-13)
        assert expected.sequential == expected.evaluations
        assert found.sequential <= found.evaluations
    return batched.report


# ---- equal to one by one, whatever the options and however few the iterations --------------------------------------

every_option = st.fixed_dictionaries(
    {
        "coarsening": st.integers(2, 4),
        "levels": st.integers(2, 3),
        "relaxation": st.sampled_from(["F", "FCF"]),
        "coarse": st.sampled_from(["sample", "branch", "half", "branch:3", Midpoint()]),
        "cycle": st.sampled_from(["V", "F"]),
        "initial": st.sampled_from(["coarse", "constant", "previous"]),
        "recompute": st.booleans(),
        "forward_iterations": st.sampled_from([0, 1, 2, 3, "serial"]),
        "backward_iterations": st.sampled_from([0, 1, 2, 3, "serial"]),
    }
)


@settings(max_examples=35)
@given(
    depth=st.integers(3, 13),
    options=every_option,
    buffers=st.sampled_from([(0, 0), (1, 2)]),
    pair=st.booleans(),
    masked=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
)
def test_any_depth_and_options(
    depth: int, options: dict[str, Any], buffers: Any, pair: bool, masked: bool, dropout: float
) -> None:
    source = depth // 2
    stack = (
        joined(source, depth - source, dropout=dropout)
        if pair
        else encoder(depth + sum(buffers), buffers=buffers, dropout=dropout, attention_dropout=dropout)
    )
    try:
        MGRIT(**options).check(stack)
    except ValueError:
        return
    x, inputs = state(pair=pair), (keys(),) if masked else ()
    for _ in range(2 if options["initial"] == "previous" else 1):
        equals_one_by_one(stack, options, x, *inputs)


@settings(max_examples=10)
@given(
    depth=st.integers(1, 9),
    sweeps=st.integers(1, 4),
    chunk=st.sampled_from([None, 2, 3]),
    recompute=st.booleans(),
    pair=st.booleans(),
)
def test_any_picard(depth: int, sweeps: int, chunk: int | None, recompute: bool, pair: bool) -> None:
    stack = joined(depth, 2, dropout=0.2) if pair else encoder(depth, dropout=0.2)
    options: dict[str, Any] = {"chunk": chunk, "recompute": recompute}
    options |= {"forward_iterations": sweeps, "backward_iterations": sweeps}
    report = equals_one_by_one(stack, options, state(pair=pair), kind=Picard)
    if chunk is None and not pair and recompute:
        assert report.forward.sequential == min(sweeps, depth)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("coarse", ["sample", "half"])
@pytest.mark.parametrize("pair", [True, False])
def test_converged_is_serial(pair: bool, coarse: str, recompute: bool) -> None:
    stack = joined(5, 6, dropout=0.2) if pair else encoder(11, buffers=(1, 0), dropout=0.2, attention_dropout=0.2)
    options = {"coarse": coarse, "recompute": recompute, "batched": True}
    equals_serial(stack, exact(**options), state(pair=pair), keys())
    equals_serial(stack, exact(**options, levels=3, relaxation="FCF", cycle="F"), state(pair=pair), keys())
    many: dict[str, Any] = {"forward_iterations": 11, "backward_iterations": 11}
    equals_serial(stack, Picard(**many, recompute=recompute, batched=True), state(pair=pair), keys())


def test_tolerance_stops_where_it_stops_one_by_one() -> None:
    options = {"coarsening": 2, "forward_iterations": 9, "backward_iterations": 9, "tolerance": 1e-5}
    report = equals_one_by_one(encoder(16, step=0.1), options, state())
    assert 1 < report.forward.iterations < 8


# ---- the sequential depth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "c"), [(16, 4), (30, 5), (23, 4)])
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize(("coarse", "sums"), [("sample", 1), ("branch", 1), ("half", 2)])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_iteration_takes_c_and_n_over_c_batches(
    depth: int, c: int, relaxation: Any, coarse: str, sums: int, k: int
) -> None:
    """Relaxations of c batches each and coarse solves of N/c steps, whatever the number of intervals."""
    mgrit = MGRIT(
        coarsening=c,
        relaxation=relaxation,
        coarse=coarse,
        forward_iterations=k,
        backward_iterations=k,
        batched=True,
    )
    outcome(encoder(depth, step=0.1), mgrit, state())
    n = -(-depth // c)
    swept = 2 if relaxation == "FCF" else 1
    guess, coarse_solve = n * sums, (n - 1) * sums
    # The batches of an iteration: its relaxations, the corrections of all coarse steps, one coarse solve.
    most = guess + k * (swept * c + sums + coarse_solve) + c
    for solved in (mgrit.report.forward, mgrit.report.backward):
        assert solved.sequential <= most
        assert solved.sequential >= guess + k * (swept * (c - 1) + (n - 1 - swept * k) * sums) + (c - 2)
        assert solved.evaluations > 1.5 * solved.sequential
    assert MGRIT(batched=False).report.forward.sequential == 0


def test_sequential_depths_exactly() -> None:
    mgrit = MGRIT(coarsening=4, coarse="branch", forward_iterations=1, backward_iterations=1, batched=True)
    outcome(encoder(32, step=0.1), mgrit, state())
    # Guess: 8 sums. Relaxation: its first steps are among their terms, so 3. Coarse solve: 7 sums less the one that
    # starts from an exact state. Last relaxation: without its first steps and the last of each interval but one.
    assert mgrit.report.forward.sequential == 8 + 3 + 6 + 1 + 3
    assert mgrit.report.backward.sequential == 8 + 3 + 6 + 1 + 4  # all steps again for the parameters


# ---- layers that are not alike -------------------------------------------------------------------------------------


def test_layers_that_are_not_alike_are_evaluated_by_themselves() -> None:
    layers: list[nn.Module] = [EncoderLayer(WIDTH, heads=2, mlp=12) for _ in range(9)]
    layers[2] = EncoderLayer(WIDTH, heads=2, mlp=20)
    layers[4] = Doubled()
    layers[7].register_forward_hook(lambda *_: None)
    stack = ready(Stack(layers, step=0.2))
    options = {"coarsening": 3, "coarse": "branch"}
    report = equals_one_by_one(stack, options, state())
    assert report.forward.sequential < report.forward.evaluations
    mgrit = MGRIT(**options, batched=True)  # pyright: ignore[reportArgumentType]
    stack(state(), executor=mgrit)
    assert sorted(mgrit.alone) == [2, 4, 7]
    for n, word in ((2, "no other layer"), (4, "Doubled"), (7, "hooks")):
        assert word in mgrit.alone[n]


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(x))


@pytest.mark.parametrize("recompute", [True, False])
def test_two_kinds_make_two_batches_a_position(recompute: bool) -> None:
    layers = [EncoderLayer(WIDTH, heads=2, mlp=12 + 4 * (n % 2)) for n in range(12)]
    options = {"coarsening": 3, "coarse": "branch", "recompute": recompute}
    report = equals_one_by_one(ready(Stack(layers, step=0.2)), options, state())
    assert report.forward.sequential < report.forward.evaluations


def test_layers_of_other_kinds_change_nothing() -> None:
    report = equals_one_by_one(toys(8), {"coarsening": 2, "coarse": "half"}, tokens())
    assert report.forward.sequential == report.forward.evaluations
    mgrit = MGRIT(coarsening=2, batched=True)
    toys(8)(tokens(), executor=mgrit)
    assert len(mgrit.alone) == 8


def test_other_side_inputs_than_a_mask_change_nothing() -> None:
    class Reads(EncoderLayer):
        def residual(self, x: Tensor, memory: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().residual(x) * memory

    stack = ready(Stack([Reads(WIDTH, heads=2, mlp=12) for _ in range(6)], step=0.3))
    equals_one_by_one(stack, {"coarsening": 2}, state(), tokens(2, 3, WIDTH))


def test_step_sizes_may_differ_within_a_batch() -> None:
    own = [EncoderLayer(WIDTH, heads=2, mlp=12).double() for _ in range(3)]
    x, steps = tokens(2, 3, WIDTH, grad=False), [1.0, 0.5, 0.25]
    plain = make_layers(own, steps, x, ())
    batched = batch_layers(plain, Batching(), range(3), (x,))
    with torch.no_grad():
        for (a,), (b,) in zip(*(each.increments([(n, (x,)) for n in range(3)]) for each in (plain, batched))):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    pulls = [(n, (x + n,), (x,)) for n in range(3)]
    for (a,), (b,) in zip(plain.pull_backs(pulls), batched.pull_backs(pulls)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
def test_shared_layers_and_parameters_get_each_gradient_once(recompute: bool) -> None:
    one, two, three = (EncoderLayer(WIDTH, heads=2, mlp=12) for _ in range(3))
    two.mlp.up.weight = three.mlp.up.weight
    stack = ready(Stack([one, two, one, three, one, two, three], step=0.3))
    equals_one_by_one(stack, {"coarsening": 2, "coarse": "branch", "recompute": recompute}, state())
    equals_serial(stack, exact(batched=True, recompute=recompute), state())


@pytest.mark.parametrize("recompute", [True, False])
def test_frozen_layers_get_no_gradient(recompute: bool) -> None:
    stack, options = encoder(8), {"coarsening": 2, "coarse": "half", "recompute": recompute}
    for n in (0, 3, 4):
        stack.layers[n].requires_grad_(False)
    equals_one_by_one(stack, options, state())
    loss_of(stack(state(), executor=MGRIT(**options, batched=True))).backward()  # pyright: ignore[reportArgumentType]
    without = [n for n, layer in enumerate(stack.layers) if all(p.grad is None for p in layer.parameters())]
    assert without == [0, 3, 4]
    equals_one_by_one(stack.requires_grad_(False), options, state())


def test_a_step_of_training_is_seen_by_the_next_call() -> None:
    stack, x = encoder(8), state()
    mgrit = exact(batched=True, coarse="branch")
    optimiser = torch.optim.AdamW(stack.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(stack(x, executor=mgrit), stack(x), rtol=0, atol=1e-10)
        equals_serial(stack, mgrit, x)
        optimiser.zero_grad()
        loss_of(stack(x, executor=mgrit)).backward()
        optimiser.step()


def test_backward_twice_and_two_calls_before_their_backward_passes() -> None:
    stack, x = encoder(8, dropout=0.2), state()
    for recompute in (True, False):
        mgrit = exact(batched=True, recompute=recompute)
        first, second = stack(x, executor=mgrit), stack(x, executor=mgrit)
        grads = [
            torch.autograd.grad(loss_of(y), [x, *stack.parameters()], retain_graph=True) for y in (second, first, first)
        ]
        expected = torch.autograd.grad(loss_of(stack(x)), [x, *stack.parameters()])
        for found in grads:
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_without_gradients_and_in_inference_mode() -> None:
    stack, x = encoder(8), state()
    mgrit = exact(batched=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(stack(x, executor=mgrit), stack(x), rtol=0, atol=1e-10)
    equals_serial(stack, mgrit, x)


def test_bfloat16_autocast() -> None:
    stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(8)], step=0.3)
    x, found = torch.randn(2, 5, 16), []
    for executor in (exact(batched=True), exact(batched=True, recompute=False), Serial()):
        stack.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = stack(x, executor=executor)
        loss_of(y).backward()
        assert y.dtype == torch.float32
        found.append({"y": y.detach(), **{name: p.grad for name, p in stack.named_parameters()}})
    full = outcome(stack, Serial(), x)["value 0"]
    assert full is not None
    for one in found[:2]:
        assert (one["y"] - full).norm() > 1e-4 * full.norm()  # it was in low precision
        for name, expected in found[2].items():
            assert (one[name] - expected).norm() <= 0.03 * expected.norm() + 1e-3, name


# ---- kept graphs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stacked_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each evaluation of stacked layers had."""
    sizes: list[int] = []
    original = StackedLayers.increments

    def counted(self: StackedLayers, layers: Sequence[nn.Module], *args: Any, **options: Any) -> Any:
        sizes.append(len(layers))
        return original(self, layers, *args, **options)

    monkeypatch.setattr(StackedLayers, "increments", counted)
    return sizes


def test_kept_graphs_serve_the_relaxations_of_the_adjoint(stacked_sizes: list[int]) -> None:
    stack, x = encoder(12), state()
    made = {}
    for recompute in (True, False):
        mgrit = MGRIT(coarsening=3, coarse="branch", backward_iterations=0, batched=True, recompute=recompute)
        y = stack(x, executor=mgrit)
        stacked_sizes.clear()
        loss_of(y).backward()
        made[recompute] = list(stacked_sizes)
    # Four sums of three layers for the guess; then three positions of four intervals, unless their graphs were kept.
    assert made[True] == [3] * 4 + [4] * 3
    assert made[False] == [3] * 4


def test_recomputing_holds_no_graph_between_the_passes() -> None:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[1:] == (6, 12):  # inside of several layers
            saved.append(tensor.shape)
        return tensor

    stack, x = encoder(8), state()
    for recompute in (True, False):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(x, executor=MGRIT(coarsening=2, batched=True, recompute=recompute))
        assert bool(saved) == (not recompute)


# ---- coarse operators of users -------------------------------------------------------------------------------------


class Mean(BranchSum):
    """Overrides what it inherits the batched form of."""

    def increment(self, steps: Sequence[Callable[[State], Increment]], x: State) -> Increment:
        return tuple(None if f is None else len(steps) * f for f in steps[-1](x))


class Ends(CoarseOperator):
    """The mean of the first and the last step, evaluated in one round."""

    def increment(self, steps: Sequence[Callable[[State], Increment]], x: State) -> Increment:
        return total([steps[0](x), steps[-1](x)])

    def rounds(self, length: int, x: State) -> Any:
        first, last = yield [(0, x), (length - 1, x)]
        return total([first, last])

    def evaluations(self, length: int) -> int:
        return 2

    def sequential(self, length: int) -> int:
        return 1


class Fewer(CoarseOperator):
    def increment(self, steps: Sequence[Callable[[State], Increment]], x: State) -> Increment:
        assert len(steps) >= 1
        assert isinstance(x, tuple)
        return steps[0](x)

    def evaluations(self, length: int) -> int:
        return 1

    def sequential(self, length: int) -> int:
        return 1


@pytest.mark.parametrize("operator", [Mean(), Ends(), Fewer(), Midpoint()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("levels", [2, 3])
def test_operators_of_users(operator: CoarseOperator, levels: int) -> None:
    stack, x = encoder(12, step=0.3), state()
    options = {"coarsening": 3 if levels == 2 else 2, "levels": levels, "coarse": operator}
    equals_one_by_one(stack, {**options, "forward_iterations": 2}, x)
    if isinstance(operator, Mean):
        assert operator.rounds(3, (x,)) is None
        as_sum = outcome(stack, MGRIT(**{**options, "coarse": "branch"}, batched=True), x)["value 0"]
        own = outcome(stack, MGRIT(**options, batched=True), x)["value 0"]
        assert not torch.allclose(own, as_sum, rtol=0, atol=1e-8)  # pyright: ignore[reportArgumentType]


def test_rounds_of_a_users_operator_are_batched() -> None:
    mgrit = MGRIT(coarsening=3, coarse=Ends(), forward_iterations=0, batched=True)
    encoder(12)(state(), executor=mgrit)
    assert mgrit.report.forward.sequential == 4 + 2


# ---- the executor --------------------------------------------------------------------------------------------------


def test_copies_of_an_executor_and_forgetting() -> None:
    stack, x = encoder(8), state()
    mgrit = MGRIT(coarsening=2, batched=True, initial="previous")
    y = stack(x, executor=mgrit)
    for copied in (copy.deepcopy(mgrit), pickle.loads(pickle.dumps(mgrit))):
        assert copied.batched
        torch.testing.assert_close(stack(x, executor=copied), y, rtol=0, atol=1e-12)
    mgrit.forget()
    torch.testing.assert_close(stack(x, executor=mgrit), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [MGRIT, Picard])
def test_batched_is_true_or_false(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"batched is 'yes'; it must be True or False"):
        kind(batched="yes")
