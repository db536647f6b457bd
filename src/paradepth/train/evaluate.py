"""Loss and accuracy of every prefix, and contributions of branches.

Shapes: B batch, … targets of a sample, N classes, n prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.distributed import World
from paradepth.models import TrunkModel
from paradepth.train.step import IGNORED, UNSEEN

if TYPE_CHECKING:
    from paradepth.train.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """Means over a split: `loss` and `accuracy` of each prefix, `contribution` ‖δ_i‖/‖x‖ of each branch, and the task's
    own `scores` by name, of each prefix."""

    loss: list[float]
    accuracy: list[float]
    contribution: list[float]
    scores: dict[str, list[float]]


def in_order(task: Task, split: str, *, world: World | None = None) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and targets of all samples of a split, `evaluation_batch` at a time; of several processes this one's share
    of the batches."""
    starts = range(0, task.count(split), task.evaluation_batch)
    for start in starts if world is None else starts[world.rank :: world.size]:
        yield task.ordered(split, start, start + task.evaluation_batch)


@torch.no_grad()
def evaluate(
    model: TrunkModel, task: Task, split: str, *, world: World, autocast: torch.dtype | None = None
) -> Evaluation:
    """Evaluates every prefix of `model` on a split of the task's data, shared among the processes of `world`.

    Returns the same numbers on every process; the model's training mode is left as it was.
    """
    was_training = model.training
    model.eval()
    n = model.prefixes
    branches = n if model.config.branches else 0
    sums = torch.zeros(2 + 2 * n + branches, dtype=torch.float64, device=world.device)
    tally_nK = torch.zeros(n, task.tally_size, dtype=torch.float64, device=world.device)
    for number, (inputs, targets_B) in enumerate(in_order(task, split, world=world)):
        with torch.autocast(world.device.type, dtype=autocast) if autocast else nullcontext():
            logits_nBN = model.prefix_logits(inputs).float().flatten(1, -2)
        flat_B = targets_B.flatten()
        known_B = flat_B.masked_fill(flat_B <= UNSEEN, IGNORED)
        losses_n = torch.stack(
            [F.cross_entropy(logits_BN, known_B, ignore_index=IGNORED, reduction="sum") for logits_BN in logits_nBN]
        )
        sums[0] += (known_B != IGNORED).sum()
        sums[1] += (flat_B != IGNORED).sum()
        sums[2 : 2 + n] += losses_n
        sums[2 + n : 2 + 2 * n] += (logits_nBN.argmax(dim=-1) == flat_B).sum(dim=1)
        if task.tally_size:
            tally_nK += task.tally(logits_nBN, flat_B)
        if branches and number == world.rank == 0:  # one batch tells the contributions well enough
            sums[2 + 2 * n :] += model.contributions(inputs).double().mean(dim=1)
    model.train(was_training)
    known, counted, *values = world.sum(sums).tolist()
    losses = [value / max(known, 1.0) for value in values[:n]]
    accuracy = [value / max(counted, 1.0) for value in values[n : 2 * n]]
    scores = task.scores(world.sum(tally_nK)) if task.tally_size else {}
    return Evaluation(losses, accuracy, values[2 * n :], scores)
