"""All branches from the start, one loss on the full sum. For a serial model this is ordinary training."""

from __future__ import annotations

from paradepth.train.schedules.base import Objective, Schedule


class Joint(Schedule):
    """The schedule of Para-Former (arXiv 2407.21670): min over everything of loss(prefix n).

    >>> from paradepth.train.schedules.base import Annealing
    >>> Joint(["stem", "branch1", "branch2", "head"], Annealing()).objectives(0)
    (Objective(prefix=2, weights=None, detach=False, clip=True),)
    """

    name = "joint"

    def objectives(self, pass_index: int) -> tuple[Objective, ...]:
        return (Objective(self.branches),)
