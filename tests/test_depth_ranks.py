"""Oracles of depth executors on several gloo processes, in float64."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from paradepth.depth import cut_into_parts
from processes import run_together

DRIVER = Path(__file__).with_name("depth_ranks.py")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_that_share_a_stack_compute_what_one_computes(ranks: int, tmp_path: Path) -> None:
    for status, _, errors in run_together(ranks, DRIVER, tmp_path / "out"):
        assert status == 0, errors
    done = refused = moved = batched = together = 0
    by_rank = [json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for content in by_rank:
        assert content["lipschitz"] < 1e-10
        for case, found in zip(content["cases"], content["results"], strict=True):
            if "refused" in found:
                assert "nothing to coarsen" in found["refused"] or "processes cannot share" in found["refused"]
                refused += 1
                continue
            done += 1
            moved += found["moved"] > 1e-6  # two iterations are not yet the serial result
            for name in ("converged", "serial", "picard", "few"):
                assert found[name] < 1e-10, (name, case, found)
            assert all(abs(difference) < 1e-10 for difference in found["residuals"]), (case, found)
            assert abs(found["norm"]) < 1e-5
            in_a_row, evaluations = found["counts"]  # of the process that took most, of all
            fewer = in_a_row * ranks < evaluations
            assert case["batched"] or not fewer
            batched += case["batched"]
            together += fewer
    assert done >= 20 * ranks
    assert refused
    assert batched > 5 * ranks
    assert together > batched / (2 if ranks == 2 else 10)
    assert moved > done / 2
    for found in zip(*(content["results"] for content in by_rank), strict=True):
        if "own" in found[0]:
            shares = [part["own"] for part in found]
            assert max(shares) < sum(shares)  # nobody holds all
            assert found[0]["gathered"] > 0
            assert all(part["gathered"] == 0 for part in found[1:])


@pytest.mark.parametrize("depth", [5, 12, 33])
@pytest.mark.parametrize("unit", [1, 2, 5])
@pytest.mark.parametrize("buffers", [(0, 0), (2, 1)])
def test_parts_are_whole_intervals_and_differ_by_one(depth: int, unit: int, buffers: tuple[int, int]) -> None:
    between = depth - sum(buffers)
    intervals = -(-between // unit)
    for ranks in range(1, intervals + 1):
        bounds = cut_into_parts(depth, buffers=buffers, unit=unit, ranks=ranks)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, depth, ranks + 1)
        inner = [buffers[0], *bounds[1:-1], depth - buffers[1]]
        counts = [-(-(b - a) // unit) for a, b in pairwise(inner)]
        assert max(counts) - min(counts) <= 1
        assert all((cut - buffers[0]) % unit == 0 for cut in inner[1:-1])
    with pytest.raises(ValueError, match=f"{intervals + 1} processes cannot share"):
        cut_into_parts(depth, buffers=buffers, unit=unit, ranks=intervals + 1)
