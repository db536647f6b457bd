"""The order of samples: hold-out splits and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paradepth.data import Batches, ImageSplit
from paradepth.data.split import stratified_split


def test_stratified_split():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    kept, held = stratified_split(labels, 0.1, seed=0)
    assert labels[held].bincount(minlength=4).tolist() == [10, 1, 1, 0]
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert not torch.equal(held, stratified_split(labels, 0.1, seed=1)[1])
    assert stratified_split(labels, 0.999, seed=0)[0].tolist() != []
    with pytest.raises(ValueError, match="every class has a single one"):
        stratified_split(torch.arange(5), 0.2, seed=0)


def numbered(count):
    return ImageSplit(torch.arange(count).to(torch.uint8).view(count, 1, 1, 1), torch.arange(count))


def test_a_pass_shows_each_sample_once_in_an_order_of_its_own():
    batches = Batches(numbered(20), batch_size=6, seed=5, drop_last=False)
    orders = [torch.cat([batches.get(p, b)[1] for b in range(len(batches))]).tolist() for p in range(3)]
    assert len(batches) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != list(range(20))
    images, labels = batches.get(1, 2)
    assert torch.equal(images.flatten().long(), labels), "images and labels come apart"


def test_batches_are_a_pure_function_of_seed_pass_and_index():
    batches = Batches(numbered(50), batch_size=8, seed=1)
    asked = [(3, 2), (0, 0), (3, 2), (1, 5), (0, 0)]
    seen = [batches.get(*place)[1].tolist() for place in asked]
    fresh = [Batches(numbered(50), batch_size=8, seed=1).get(*place)[1].tolist() for place in asked]
    assert seen == fresh
    assert seen[0] == seen[2]
    assert Batches(numbered(50), batch_size=8, seed=2).get(0, 0)[1].tolist() != seen[1]
    # seed + 1 must not repeat the next pass of seed
    assert Batches(numbered(50), batch_size=8, seed=2).get(0, 0)[1].tolist() != batches.get(1, 0)[1].tolist()
    state = torch.random.get_rng_state()
    Batches(numbered(50), batch_size=8, seed=1).get(9, 0)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("drop_last", [True, False])
def test_slices_of_the_ranks_make_the_batch_of_one_process(drop_last):
    alone = Batches(numbered(21), batch_size=8, seed=0, drop_last=drop_last)
    ranks = [Batches(numbered(21), batch_size=8, seed=0, rank=r, world_size=4, drop_last=drop_last) for r in range(4)]
    assert len(alone) == (2 if drop_last else 3)
    for index in range(len(alone)):
        together = torch.cat([rank.get(2, index)[1] for rank in ranks])
        assert torch.equal(together, alone.get(2, index)[1])


def test_batches_refuse_what_cannot_be():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 6, "world_size": 4}, "positive multiple of the 4"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_size": 11}, "only 10 samples"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Batches(numbered(10), seed=0, **options)
    with pytest.raises(ValueError, match="only 0 samples"):
        Batches(numbered(0), batch_size=1, seed=0, drop_last=False)
    batches = Batches(numbered(10), batch_size=5, seed=0)
    for place in ((0, 2), (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            batches.get(*place)
