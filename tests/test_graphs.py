"""The bookkeeping of recorded evaluations, with a stand-in for the CUDA graph; the graphs themselves need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from paradepth.branches import Batched, Branches, Loop, graphs
from paradepth.branches.executor import wants_gradients
from paradepth.depth import Stack
from paradepth.nn import EncoderLayer


class Replay:
    """Does again what was recorded: reads the same tensors, writes into the same ones."""

    made = 0

    def __init__(self, evaluate: Any, x: Any, inputs: Any) -> None:
        Replay.made += 1
        self.evaluate, self.x, self.inputs = evaluate, x, inputs
        self.outputs = evaluate(x, inputs)

    def replay(self) -> None:
        tree_map(lambda old, new: old.copy_(new), self.outputs, self.evaluate(self.x, self.inputs))


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Batched:
    def record(evaluate: Any, x: Any, inputs: Any) -> tuple[Any, Any]:
        replay = Replay(evaluate, x, inputs)
        return replay, replay.outputs

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphs.Graphs, "fit", lambda branches, x, inputs: not wants_gradients(branches, x, inputs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Replay.made = 0
    return Batched(graphs=True)


def check(trunk: Branches, executor: Batched, x: Any, *inputs: Any, branches: int | None = None) -> int:
    """Compares with the loop; how many evaluations were recorded for it."""
    before = Replay.made
    trunk.executor = executor
    found = trunk(x, *inputs, branches=branches)
    trunk.executor = Loop()
    torch.testing.assert_close(found, trunk(x, *inputs, branches=branches))
    return Replay.made - before


def trunk_of(count: int) -> Branches:
    return Branches([Stack([EncoderLayer(8, heads=2, mlp=12, dropout=0.1)]) for _ in range(count)]).double().eval()


def test_an_evaluation_is_recorded_once_and_anew_when_something_changed(executor: Batched) -> None:
    trunk = trunk_of(3)
    x, mask = torch.randn(2, 4, 8, dtype=torch.float64), torch.tensor([True, True, False, True]).expand(2, 1, 1, 4)
    with torch.inference_mode():
        assert check(trunk, executor, x) == 1
    with torch.no_grad():
        assert check(trunk, executor, torch.randn_like(x)) == 0, "other values, in another mode"
        assert check(trunk, executor, x, branches=2) == 1
        assert check(trunk, executor, x, mask) == 1
        assert check(trunk, executor, x, ~mask | mask) == 0
        assert check(trunk, executor, x[:1]) == 1
        assert check(trunk, executor, x) == 0
        next(trunk.parameters()).add_(0.5)
        assert check(trunk, executor, x) == 1
        assert check(trunk, executor, x) == 0
        assert check(trunk_of(3), executor, x) == 1, "another model"
        trunk.executor = executor
        first = trunk.prefix_states(x)
        kept = first.clone()
        trunk.prefix_states(x + 1)
        assert torch.equal(first, kept), "what was returned is not written over"
        executor.forget()
        assert check(trunk, executor, x) == 1
    assert check(trunk, executor, x) == 0, "with gradients nothing is recorded"


def test_a_recording_holds_what_it_reads_and_few_are_kept(executor: Batched) -> None:
    trunk, x = trunk_of(3), torch.randn(2, 4, 8, dtype=torch.float64)
    assert executor._graphs is not None
    with torch.no_grad():
        check(trunk, executor, x, branches=2)
        (recorded,) = executor._graphs._recorded.values()
        two = recorded.held[0]["mlp.up"]
        check(trunk, executor, x)  # its stacked weights take the place of the two branches'
        assert executor._layers.kept()[0]["mlp.up"].shape[0] == 3
        assert two.shape[0] == 2
        assert check(trunk, executor, x, branches=2) == 0
        for tokens in range(1, 20):
            check(trunk, executor, torch.randn(1, tokens, 8, dtype=torch.float64))
        assert len(executor._graphs._recorded) == executor._graphs.keep == 16
