"""Which samples of earlier tasks are kept: pure functions of the seed, so nothing has to be saved.

Shapes: N samples of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from paradepth.data.seeds import generator

Policy = Literal["balanced", "reservoir"]


def balanced(labels: Sequence[Tensor], capacity: int, *, seed: int) -> list[Tensor]:
    """Equally many samples of every class of every task so far.

    What is kept after a task is a part of what was kept before it and of the task's own samples, as a memory can do it:
    of every class the first ones of an order that does not change. Classes with fewer samples leave their places empty.

    Args:
        labels: of each task so far, the class of each sample (N,).
        capacity: samples kept in all.
        seed: of the orders.

    Returns:
        For each task the numbers of the samples that are kept, ascending.

    Raises:
        ValueError: a capacity below 0.

    >>> kept = balanced([torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2, 2, 2])], 4, seed=0)
    >>> tuple(len(indices) for indices in kept)
    (3, 1)
    """
    _check(capacity)
    groups = [(task, int(label)) for task, own in enumerate(labels) for label in own.unique().tolist()]
    kept: list[list[Tensor]] = [[] for _ in labels]
    for place, (task, label) in enumerate(groups):
        share = capacity // len(groups) + (place < capacity % len(groups))
        members = (labels[task] == label).nonzero().flatten().cpu()
        order = torch.randperm(len(members), generator=generator(seed, "memory", task, label))
        kept[task].append(members[order[:share]])
    return [torch.cat(parts).sort().values if parts else torch.zeros(0, dtype=torch.int64) for parts in kept]


def reservoir(counts: Sequence[int], capacity: int, *, seed: int) -> list[Tensor]:
    """A uniform sample of the stream of all samples so far, kept while it goes by (algorithm R).

    Within a task the stream has an order that the seed draws.

    Args:
        counts: samples of each task so far.
        capacity: samples kept in all.
        seed: of the stream and of the choice.

    Returns:
        For each task the numbers of the samples that are kept, ascending.

    Raises:
        ValueError: a capacity below 0.

    Source: J. S. Vitter, Random Sampling with a Reservoir, 1985.

    >>> sum(len(indices) for indices in reservoir([50, 50], 20, seed=0))
    20
    """
    _check(capacity)
    slots: list[tuple[int, int]] = []
    gone = 0
    for task, count in enumerate(counts):
        draws = generator(seed, "reservoir", task)
        order = torch.randperm(count, generator=draws).tolist()
        chance = torch.rand(count, generator=draws, dtype=torch.float64)
        places = (chance * torch.arange(gone + 1, gone + count + 1)).long().tolist()
        for sample, place in zip(order, places, strict=True):
            if len(slots) < capacity:
                slots.append((task, sample))
            elif place < capacity:
                slots[place] = (task, sample)
        gone += count
    return [torch.tensor(sorted(s for t, s in slots if t == task), dtype=torch.int64) for task in range(len(counts))]


def _check(capacity: int) -> None:
    if capacity < 0:
        raise ValueError(f"memory is {capacity}; it is a number of samples, at least 0")
