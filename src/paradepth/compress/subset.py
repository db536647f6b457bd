"""Keeping the best branches, whichever they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paradepth.compress.prefix import BranchCount
from paradepth.compress.step import register
from paradepth.compress.sums import BranchSums
from paradepth.models import TrunkModel

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@dataclass(frozen=True)
class Found:
    """A subset of the branches.

    Attributes:
        branches: their numbers in the model, counted from 0; the first k of them are what was found for size k.
        loss: on the validation split.
        by: how it was found.
    """

    branches: tuple[int, ...]
    loss: float
    by: Literal["prefix", "forward", "backward"]


@register
class Subset(BranchCount):
    """Keeps the branches whose sum has the lowest validation loss, as far as greedy searches tell.

    Three candidates: the prefix; forward, which starts with the best single branch and adds the one that helps most;
    backward, which starts with all of them and leaves out the one that is missed least. The best one is taken, so on
    the validation split the result is never worse than the prefix of the same size. Branches have the order in which
    they were found, the most useful ones first, so prefixes of the result are good subsets as well.

    Branches that were trained jointly have no order, and there it matters which ones are kept: on digits (4 branches ×
    2 layers) the best two had 81.3 % on the test split where the first two had 69.9 %. Trained by stages, the first
    ones were the best ones.

    >>> str(Subset.parse("2"))
    'subset=2'
    """

    name = "subset"

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        self.check(model)
        candidates = search(model, bench, self.count)
        best = min(candidates, key=lambda found: found.loss)
        bench.note(
            self,
            branches=[index + 1 for index in best.branches],
            by=best.by,
            loss={found.by: found.loss for found in candidates},
        )
        return model.select(best.branches).eval()


def search(model: TrunkModel, bench: Workbench, count: int) -> list[Found]:
    """The prefix of `count` branches, and the subsets that forward and backward search find, in this order."""
    sums, n = BranchSums(model, bench), model.prefixes
    forward: list[int] = []
    while len(forward) < count:
        left = [index for index in range(n) if index not in forward]
        losses = sums.losses([[*forward, index] for index in left])
        forward.append(left[losses.index(min(losses))])
    kept, dropped = list(range(n)), []
    while len(kept) > 1:
        losses = sums.losses([[other for other in kept if other != index] for index in kept])
        dropped.append(kept.pop(losses.index(min(losses))))
    backward = [*kept, *reversed(dropped)][:count]
    subsets = [list(range(count)), forward, backward]
    names: tuple[Literal["prefix", "forward", "backward"], ...] = ("prefix", "forward", "backward")
    return [
        Found(tuple(branches), loss, name)
        for branches, loss, name in zip(subsets, sums.losses(subsets), names, strict=True)
    ]
