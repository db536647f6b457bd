"""Worker threads: modes, hooks, freed graphs, errors, and torch's own threads."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paradepth.branches import Branches, Loop, Threads
from paradepth.depth import Stack
from paradepth.nn import EncoderLayer, SourceLayer, TargetLayer


class Spy(nn.Module):
    """A layer that tells what it sees of its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[Any] = []

    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        self.seen.append((*modes, threading.current_thread().name.startswith("branches"), torch.get_num_threads()))
        return x * self.weight

    def forward(self, x: Tensor, *inputs: Any, step: float = 1.0) -> Tensor:
        return x + step * self.residual(x)


@pytest.fixture
def _four_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_four_threads")
def test_workers_have_the_callers_modes_and_their_share_of_threads() -> None:
    spies = [Spy() for _ in range(3)]
    trunk = Branches([Stack([spy]) for spy in spies], executor=Threads(2))
    x = torch.randn(2, 3, 4)

    def seen() -> set[Any]:
        trunk(x)
        return {spy.seen.pop() for spy in spies}

    assert seen() == {(True, False, False, True, 2)}
    with torch.no_grad():
        assert seen() == {(False, False, False, True, 2)}
    with torch.inference_mode():
        assert seen() == {(False, True, False, True, 2)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert seen() == {(True, False, True, True, 2)}
    assert torch.get_num_threads() == 4
    found: list[int] = []
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [4], "threads that start later are not affected"
    torch.set_num_threads(2)
    assert seen() == {(True, False, False, True, 1)}
    trunk.executor = Threads(1)
    assert seen() == {(True, False, False, False, 2)}
    trunk.executor = Threads()
    assert seen() == {(True, False, False, True, 1)}


def encoders(count: int) -> Branches:
    branches = [Stack([EncoderLayer(8, heads=2, mlp=12)]) for _ in range(count)]
    return Branches(branches, executor=Threads(2)).double()


def gradients(trunk: Branches, x: Any, *inputs: Any) -> list[Tensor]:
    leaves = [*(x if isinstance(x, tuple) else (x,)), *trunk.parameters()]
    states = trunk.prefix_states(x, *inputs)
    ends = [t.square().sum() for t in (states if isinstance(states, tuple) else (states,))]
    found = torch.autograd.grad(ends, [t for t in leaves if t.requires_grad], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def check(trunk: Branches, x: Any, *inputs: Any) -> None:
    found = gradients(trunk, x, *inputs)
    before, trunk.executor = trunk.executor, Loop()
    torch.testing.assert_close(found, gradients(trunk, x, *inputs), rtol=1e-10, atol=1e-10)
    trunk.executor = before


def test_joined_states_and_side_inputs_that_need_gradients() -> None:
    z = tuple(torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True) for tokens in (5, 4))
    branches = [Stack([SourceLayer(8, heads=2, mlp=12), TargetLayer(8, heads=2, mlp=12)]) for _ in range(3)]
    check(Branches(branches, executor=Threads(2)).double(), z, torch.ones(2, 1, 1, 5, dtype=torch.bool))
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    check(encoders(3), x)
    check(encoders(3), x.detach())
    frozen = encoders(3)
    frozen.branches[1].requires_grad_(False)
    check(frozen, x)


def test_layers_of_other_kinds_and_shared_ones() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    spies = Branches([Stack([Spy()]) for _ in range(3)], executor=Threads(2)).double()
    check(spies, x)
    tied = encoders(3)
    tied.branches[2] = tied.branches[0]
    check(tied, x)


def test_hooks_are_called_once() -> None:
    trunk, x = encoders(3), torch.randn(2, 4, 8, dtype=torch.float64)
    check(trunk, x)
    parameter = next(trunk.parameters())
    parameter.register_hook(lambda grad: 2 * grad)
    check(trunk, x)
    calls: list[str] = []
    parameter.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    trunk.branches[1].register_forward_hook(lambda *a: calls.append("forward"))  # pyright: ignore
    trunk(x).sum().backward()
    assert sorted(calls) == ["accumulated", "forward"]


def test_graphs_are_freed_after_the_backward_pass_or_kept_when_asked() -> None:
    trunk, x = encoders(3), torch.randn(2, 4, 8, dtype=torch.float64)
    y = trunk(x).square().sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in trunk.parameters() if p.grad is not None]
    y.backward()
    torch.testing.assert_close([p.grad for p in trunk.parameters()], [2 * g for g in once])
    z = trunk(x)
    z.sum().backward()
    with pytest.raises(RuntimeError, match=r"retain_graph|second time"):
        z.sum().backward()


def test_errors_of_a_branch_reach_the_caller_and_the_workers_live_on() -> None:
    trunk, x = encoders(3), torch.randn(2, 4, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        trunk(torch.randn(2, 4, 7, dtype=torch.float64))
    check(trunk, x)


def test_fake_tensors_and_transforms_stay_on_the_callers_thread() -> None:
    trunk, x = encoders(3), torch.randn(2, 4, 8, dtype=torch.float64)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert trunk(torch.randn(2, 4, 8, dtype=torch.float64)).shape == x.shape
    many = torch.func.vmap(trunk)(torch.stack([x, x + 1]))
    torch.testing.assert_close(many[1], trunk(x + 1))


def test_copies_and_refusals() -> None:
    trunk, x = encoders(2), torch.randn(2, 4, 8, dtype=torch.float64)
    trunk(x)
    twin = copy.deepcopy(trunk)
    assert isinstance(twin.executor, Threads)
    assert twin.executor.workers == 2
    check(twin, x)
    with pytest.raises(ValueError, match="workers is 0"):
        Threads(0)
    with pytest.raises(ValueError, match="threads are for CPUs"):
        trunk.to("meta")(x.to("meta"))
