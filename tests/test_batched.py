"""The batched executor: what it evaluates together, what alone, and that its copies follow the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paradepth.branches import Batched, Branches, Loop
from paradepth.depth import Serial, Stack
from paradepth.nn import EncoderLayer, SourceLayer, TargetLayer


def trunk_of(*branches: list[nn.Module], step: float = 1.0, **options: Any) -> Branches:
    trunk = Branches([Stack(layers, step=step) for layers in branches], executor=Batched(), **options)
    return trunk.double()


def layers(count: int, mlp: int = 12, kind: Any = EncoderLayer, **options: Any) -> list[nn.Module]:
    return [kind(8, heads=2, mlp=mlp, **options) for _ in range(count)]


def check(trunk: Branches, x: Any, *inputs: Any) -> Batched:
    """Every prefix against the loop; returns the executor as the full trunk left it."""
    executor = trunk.executor
    assert isinstance(executor, Batched)
    for k in range(1, len(trunk) + 1):
        trunk.executor = Loop()
        expected = trunk(x, *inputs, branches=k), trunk.prefix_states(x, *inputs, branches=k)
        trunk.executor = executor
        found = trunk(x, *inputs, branches=k), trunk.prefix_states(x, *inputs, branches=k)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    trunk(x, *inputs)
    return executor


class Foreign(nn.Module):
    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        return x.tanh()

    def forward(self, x: Tensor, *inputs: Any, step: float = 1.0) -> Tensor:
        return x + step * self.residual(x)


def test_branches_that_are_alike_are_grouped_and_the_others_are_alone() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    trunk = trunk_of(layers(1), layers(2), layers(1), [Foreign()], layers(2), layers(1, mlp=16), step=0.5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            executor = check(trunk, x)
        assert executor.groups == ((0, 2), (1, 4))
        assert executor.alone.keys() == {3, 5}
        assert "Foreign" in executor.alone[3]
        assert executor.alone[5] == "no other branch is alike"


@pytest.mark.parametrize("depth", [1, 2])
def test_half_precision_weights_give_half_precision_states(depth: int) -> None:
    trunk, x = trunk_of(*(layers(depth) for _ in range(3))), torch.randn(2, 4, 8, dtype=torch.float64)
    exact = trunk(x)
    trunk.bfloat16()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = trunk(x.bfloat16())
            assert found.dtype == trunk.prefix_states(x.bfloat16()).dtype == torch.bfloat16
            torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)


def test_buffers_and_step_sizes_count() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    stacks = [Stack(layers(3), step=0.25, buffers=(1, 0)), Stack(layers(3), step=0.25, buffers=(1, 0))]
    trunk = Branches([*stacks, Stack(layers(3), step=0.25)], executor=Batched()).double()
    assert check(trunk, x).groups == ((0, 1),)


def test_frozen_branches_are_a_group_of_their_own() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    trunk = trunk_of(*(layers(1) for _ in range(5)))
    for branch in trunk.branches[:3]:
        branch.requires_grad_(False)
    assert check(trunk, x).groups == ((0, 1, 2), (3, 4))
    trunk(x).sum().backward()
    assert [p.grad is not None for b in trunk.branches for p in b.parameters()] == [False] * 36 + [True] * 24
    with torch.no_grad():
        assert check(trunk, x).groups == ((0, 1, 2, 3, 4),)


@pytest.mark.parametrize("aggregate", ["residual", "sum"])
def test_joined_states(aggregate: str) -> None:
    z = tuple(torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True) for tokens in (5, 4))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    branches = [[*layers(2, kind=SourceLayer), *layers(2, kind=TargetLayer)] for _ in range(3)]
    trunk = trunk_of(*branches, step=0.5, aggregate=aggregate)
    assert check(trunk, z, mask).groups == ((0, 1, 2),)
    source_only = trunk_of(*(layers(1, kind=SourceLayer) for _ in range(2)))
    assert check(source_only, z, mask).groups == ((0, 1),)
    states = source_only(z)
    torch.testing.assert_close(states[1], z[1])


def test_what_has_executors_hooks_or_strange_inputs_of_its_own_is_evaluated_as_usual() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    trunk = trunk_of(*(layers(1) for _ in range(4)))
    seen: list[int] = []
    stacks: list[Any] = list(trunk.branches)
    stacks[0].register_forward_hook(lambda *a: seen.append(0))
    stacks[1].layers[0].register_forward_hook(lambda *a: seen.append(1))
    stacks[2].executor = Serial(checkpoint=True)
    trunk(x)
    assert isinstance(trunk.executor, Batched)
    assert trunk.executor.alone.keys() == {0, 1, 2, 3}
    assert seen == [0, 1]
    plain = trunk_of(*(layers(1) for _ in range(2)))
    with pytest.raises(TypeError):
        plain(x, None, None)  # as the layer says it
    with pytest.raises(TypeError):
        plain((x, x))


def test_copies_and_truncated_or_grown_trunks_follow_their_own_weights() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    trunk = trunk_of(*(layers(1) for _ in range(3)))
    with torch.no_grad():
        before = trunk(x)
        twin = copy.deepcopy(trunk)
        for parameter in twin.parameters():
            parameter.add_(0.1)
        check(twin, x)
        torch.testing.assert_close(trunk(x), before, rtol=0, atol=0)
        trunk.branches.append(Stack(layers(1)).double())
        check(trunk, x)
        del trunk.branches[0]
        check(trunk, x)


def test_without_a_gpu_graphs_are_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="CUDA"):
        Batched(graphs=True)


@pytest.mark.gpu
def test_graphs_replay_what_the_loop_computes() -> None:
    trunk = trunk_of(*(layers(2, dropout=0.1) for _ in range(3))).cuda().eval()
    graphs = Batched(graphs=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for batch in (2, 3, 2):
            x = torch.randn(batch, 4, 8, dtype=torch.float64, device="cuda")
            mask = torch.rand(batch, 1, 1, 4, device="cuda") < 0.7
            mask[..., 0] = True
            for inputs in ((), (mask,)):
                with mode():
                    for k in (2, 3):
                        trunk.executor = Loop()
                        expected = trunk(x, *inputs, branches=k), trunk.prefix_states(x, *inputs, branches=k)
                        trunk.executor = graphs
                        found = trunk(x, *inputs, branches=k), trunk.prefix_states(x, *inputs, branches=k)
                        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for parameter in trunk.parameters():
                parameter.add_(0.01)  # recordings are made anew
