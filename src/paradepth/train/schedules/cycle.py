"""The cycle of the authors' public code: for every batch, one update for each prefix."""

from __future__ import annotations

from collections.abc import Sequence

from paradepth.train.schedules.base import Annealing, Objective, Schedule


class Cycle(Schedule):
    """For every batch and i = 1..n an update with the loss of prefix i, clipped; then a second pass over the data
    with the full sum, unclipped.

    Costs n(n+1)/2 branch evaluations per batch of the first pass and n per batch of the second.
    Source: the public code of ParaFormer (arXiv 2510.15425).

    Args:
        parts, annealing: see `Schedule`.
        second_pass: whether each sweep over the data is followed by one with the full sum.

    >>> cycle = Cycle(["stem", "branch1", "branch2", "head"], Annealing())
    >>> [objective.prefix for objective in cycle.objectives(0)], [objective.prefix for objective in cycle.objectives(1)]
    ([1, 2], [2])
    """

    name = "cycle"

    def __init__(self, parts: Sequence[str], annealing: Annealing, *, second_pass: bool = True) -> None:
        super().__init__(parts, annealing)
        self.second_pass = second_pass

    @property
    def passes_per_epoch(self) -> int:
        return 2 if self.second_pass else 1

    def objectives(self, pass_index: int) -> tuple[Objective, ...]:
        if self.second_pass and pass_index % 2 == 1:
            return (Objective(self.branches, clip=False),)
        return tuple(Objective(i) for i in range(1, self.branches + 1))
