"""`Auto` with an injected timer: what it measures, when, and that it leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from paradepth.branches import Auto, Branches, Loop
from paradepth.depth import Stack
from paradepth.nn import EncoderLayer, set_dropout_key


class Stopwatch:
    """Gives candidates the seconds it was told, and remembers who was measured."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.measured: list[str] = []

    def __call__(self, name: str, run: Callable[[], Any]) -> float:
        if name not in self.measured:
            run()
        self.measured.append(name)
        return self.seconds[name]


@pytest.fixture(autouse=True)
def _two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trunk_with(auto: Auto, count: int = 3, layer: Callable[[], nn.Module] | None = None) -> Branches:
    layer = layer or (lambda: EncoderLayer(8, heads=2, mlp=12, dropout=0.2))
    return Branches([Stack([layer()]) for _ in range(count)], executor=auto)


def test_the_fastest_is_measured_once_for_each_situation_and_then_used() -> None:
    watch = Stopwatch(loop=3.0, batched=1.0, threads=2.0)
    trunk = trunk_with(auto := Auto(timer=watch))
    x = torch.randn(2, 4, 8)
    trunk(x)
    assert watch.measured == ["loop", "batched", "threads"] * 5, "candidates by turns"
    (choice,) = auto.choices
    assert choice.chosen == "batched"
    assert choice.seconds == {"loop": 3.0, "batched": 1.0, "threads": 2.0}
    assert choice.situation.training
    trunk(x)
    trunk(torch.randn(2, 3, 8))  # tokens of the same power of two
    assert len(auto.choices) == 1

    def new(evaluate: Callable[[], Any]) -> bool:
        before = len(watch.measured), len(auto.choices)
        evaluate()
        return len(watch.measured) > before[0] and len(auto.choices) == before[1] + 1

    for evaluate in (
        lambda: trunk(torch.randn(3, 4, 8)),
        lambda: trunk(torch.randn(2, 5, 8)),
        lambda: trunk(x, branches=2),
        lambda: trunk.prefix_states(x),
        lambda: trunk(x, torch.ones(2, 1, 1, 4, dtype=torch.bool)),
    ):
        assert new(evaluate)
        assert not new(evaluate)
    with torch.no_grad():
        assert new(lambda: trunk(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert new(lambda: trunk(x))
        assert auto.choices[-1].situation.dtype == "float32/bfloat16"
    torch.set_num_threads(1)
    assert new(lambda: trunk(x))
    assert set(auto.choices[-1].seconds) == {"loop", "batched"}, "one thread leaves nothing to share out"
    before = len(auto.choices)
    trunk(x, branches=1)
    assert len(auto.choices) == before, "of one branch there is nothing to choose"


def test_what_does_not_apply_is_not_measured() -> None:
    watch = Stopwatch(loop=1.0, threads=2.0)

    class Other(nn.Module):
        def residual(self, x: torch.Tensor) -> torch.Tensor:
            return x.tanh()

        def forward(self, x: torch.Tensor, *, step: float = 1.0) -> torch.Tensor:
            return x + step * self.residual(x)

    trunk_with(auto := Auto(timer=watch), layer=Other)(torch.randn(2, 4, 8))
    assert set(watch.measured) == {"loop", "threads"}
    assert auto.choices[0].chosen == "loop"


def test_measuring_leaves_weights_gradients_masks_and_random_numbers_alone() -> None:
    trunk = trunk_with(Auto(timer=Stopwatch(loop=1.0, batched=2.0, threads=2.0))).train()
    set_dropout_key(trunk, seed=1, step=1)
    x = torch.randn(2, 4, 8, requires_grad=True)
    for parameter in trunk.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: (p.clone(), p.grad.clone()) for name, p in trunk.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    y = trunk(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    for name, p in trunk.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.grad is not None
        assert torch.equal(p.grad, before[name][1])
    trunk.executor = Loop()
    assert torch.equal(trunk(x), y), "the same masks, and the loop was chosen"


def test_choices_survive_in_json() -> None:
    watch = Stopwatch(loop=3.0, batched=2.0, threads=1.0)
    trunk = trunk_with(auto := Auto(timer=watch))
    x = torch.randn(2, 4, 8)
    trunk(x)
    fresh = Stopwatch(loop=1.0, batched=2.0, threads=3.0)
    trunk.executor = again = Auto(timer=fresh)
    again.load_state_dict(json.loads(json.dumps(auto.state_dict())))
    trunk(x)
    assert again.choices == auto.choices
    assert not fresh.measured
    trunk(torch.randn(5, 4, 8))
    assert [choice.chosen for choice in again.choices] == ["threads", "loop"]


@pytest.mark.gpu
def test_on_gpus_graphs_are_measured_for_inference() -> None:
    trunk = trunk_with(auto := Auto()).cuda().eval()
    x = torch.randn(2, 4, 8, device="cuda")
    expected = trunk(x)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), expected)
    assert [set(c.seconds) for c in auto.choices] == [{"loop", "batched"}, {"loop", "batched", "batched with graphs"}]


def test_time_is_measured_where_no_timer_is_given() -> None:
    trunk = trunk_with(auto := Auto())
    trunk(torch.randn(2, 4, 8)).sum().backward()
    (choice,) = auto.choices
    assert set(choice.seconds) == {"loop", "batched", "threads"}
    assert min(choice.seconds.values()) == choice.seconds[choice.chosen] > 0
