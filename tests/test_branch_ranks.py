"""Oracles of branches shared between gloo processes, in float64; balance and refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paradepth
from paradepth.branches import Branches, Loop, TrunkCache
from paradepth.depth import Stack
from paradepth.depth.channel import Alone
from paradepth.distributed import Mesh, assign_branches, join_world, shard_branches
from paradepth.models import EarlyStop
from paradepth.nn import EncoderLayer
from processes import fork_together

DRIVER = Path(__file__).with_name("branch_ranks.py")
ACTIVATION = 2 * 4 * 8 * 8  # bytes of the driver's states: B T D in float64


def found_by(processes: int, out: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """What each process found."""
    for status, _, errors in fork_together(processes, DRIVER, out, device):
        assert status == 0, errors
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module", params=[2, 3])
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by(request.param, tmp_path_factory.mktemp("ranks") / "out")


def agree(by_rank: list[dict[str, Any]], what: str) -> None:
    """Values and gradients are those of one process, and every gradient of one process is found on some process."""
    for found in zip(*(content[what] for content in by_rank), strict=True):
        case = {name: value for name, value in found[0].items() if name not in ("names", "expected")}
        for part in found:
            assert part["distance"] < 1e-10, case
        assert set().union(*(part["names"] for part in found)) == set(found[0]["expected"]), case
        everywhere = set.intersection(*(set(part["names"]) for part in found))
        assert everywhere == {name for name in found[0]["expected"] if "branches." not in name}, case


@pytest.mark.slow
def test_every_prefix_has_the_values_and_gradients_of_one_process(by_rank: list[dict[str, Any]]) -> None:
    assert len(by_rank[0]["trunks"]) == 3 * 4 * (3 + 5 + 4)
    agree(by_rank, "trunks")


@pytest.mark.slow
def test_every_schedule_has_the_losses_and_gradients_of_one_process(by_rank: list[dict[str, Any]]) -> None:
    found = by_rank[0]["schedules"]
    assert {case["schedule"] for case in found} == {"joint", "cycle", "one_pass", "stagewise"}
    assert {case["k"] for case in found if case["schedule"] in ("cycle", "stagewise")} == {1, 2, 3, 4}
    agree(by_rank, "schedules")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_does_what_gloo_does(tmp_path: Path) -> None:
    by_rank = found_by(2, tmp_path / "out", "cuda")
    agree(by_rank, "trunks")
    agree(by_rank, "schedules")


@pytest.mark.slow
def test_a_forward_sum_is_one_message_of_one_activation_whatever_the_depth(by_rank: list[dict[str, Any]]) -> None:
    ranks, depths = len(by_rank), set()
    for case in itertools.chain.from_iterable(content["trunks"] for content in by_rank):
        forward, forward_calls, backward, backward_calls = case["traffic"]
        state = ACTIVATION * (2 if case["joined"] else 1)
        assert (forward_calls, backward_calls) == (1, 1)
        assert backward == state + ACTIVATION  # the memory is a side input that learns
        if case["what"] == "sum":
            assert forward == state
            depths.add(tuple(case["depths"]))
        elif len(set(case["depths"])) == 1:
            assert forward == -(-case["k"] // ranks) * state
    assert len({sum(d) for d in depths}) == 3


@pytest.mark.slow
def test_reducing_clipping_gathering_and_growing(by_rank: list[dict[str, Any]]) -> None:
    for rank, content in enumerate(by_rank):
        found = content["together"]
        assert found["twice"] < 1e-10
        assert found["precisions"]["None"] < 1e-5
        assert found["precisions"]["torch.bfloat16"] < 1e-3  # where a gradient rounds to the next bfloat16
        assert found["precisions"]["half"] < 2e-2
        assert len(found["local"]) == 8
        assert max(found["local"].values()) < 1e-10, found["local"]
        assert abs(found["norm"]) < 1e-6
        assert found["clipped"] < 1e-6  # the factor is a float32
        assert found["same_weights"] is (True if rank == 0 else None)
        assert found["parameters"][0] < found["parameters"][1]
        assert found["flops"][0] == found["flops"][1]
        assert found["refused"] == 3, "half a model is neither resized nor saved"
        for name in ("grown", "one_branch", "prefixes_bitwise"):
            assert found[name] is True, name


def best(depths: list[int], ranks: int) -> int:
    """The least possible number of layers on the busiest process."""
    return min(
        max(sum(d for d, owner in zip(depths, owners, strict=True) if owner == rank) for rank in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(depths))
    )


@given(depths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_branches_are_balanced_by_their_layers(depths: list[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, min(3, len(depths))))
    owners = assign_branches(depths, ranks=ranks)
    assert set(owners) == set(range(ranks)), "every process has a branch"
    loads = [sum(d for d, owner in zip(depths, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * best(depths, ranks) + 1e-9
    assert max(loads) - min(loads) <= max(depths)


@given(n=st.integers(1, 40), depth=st.integers(1, 5), data=st.data())
def test_every_prefix_of_equal_branches_is_balanced(n: int, depth: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, n))
    owners = assign_branches([depth] * n, ranks=ranks)
    for k in range(1, n + 1):
        counts = [owners[:k].count(rank) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1


def branches(count: int) -> Branches:
    return Branches([Stack([EncoderLayer(8, heads=2, mlp=16, causal=True)]) for _ in range(count)])


class Row(Alone):
    """The first of some processes; nobody listens."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="4 processes cannot share 3 branches: each process needs one; use at most 3"):
        shard_branches(branches(3), Row(4))
    with pytest.raises(ValueError, match="ranks is 0"):
        assign_branches([1, 2], ranks=0)
    trunk = branches(3)
    shard_branches(trunk, Row(2))
    with pytest.raises(ValueError, match="shared between processes already"):
        shard_branches(trunk, Row(2))
    with pytest.raises(ValueError, match="generate with a whole model"):
        TrunkCache(trunk)
    model = paradepth.create_model("paraformer_nano", branches=2, depth=1)
    shard_branches(model.trunk, Row(2))
    with pytest.raises(ValueError, match="only a part of the model"):
        EarlyStop(model, [0.5])
    tied = branches(2)
    tied.branches[1].layers[0] = tied.branches[0].layers[0]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ValueError, match="is shared with a branch of another process"):
        shard_branches(tied, Row(2))
    assert all(not p.is_meta for p in tied.parameters()), "a refusal changes nothing"
    with pytest.raises(ValueError, match="ranks 0 to 1"):
        Mesh(Row(2), (0, 1, 2))
    with pytest.raises(ValueError, match="not by a mesh again"):
        Mesh(Row(2), (0, 1), local=trunk.executor)
    with pytest.raises(ValueError, match=r"depth_processes is 2 and branch_processes 2"), join_world(depth=2, branch=2):
        pass
    alone = "1 processes cannot be cut into rows of 2 that share branches"
    with pytest.raises(ValueError, match=alone), join_world("cpu", branch=2):
        pass


def test_one_process_keeps_all_branches() -> None:
    trunk, local = branches(2), Loop()
    shard_branches(trunk, Alone(), local=local)
    assert trunk.executor is local
    assert trunk(torch.zeros(1, 2, 8)).shape == (1, 2, 8)


def test_a_second_derivative_is_refused() -> None:
    trunk = branches(2)
    trunk.executor = Mesh(Alone(), (0, 0))
    x = torch.randn(1, 2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(trunk(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
