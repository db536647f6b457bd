"""The losses of all prefixes from one evaluation of the branches."""

from __future__ import annotations

from collections.abc import Sequence

from paradepth.train.schedules.base import Annealing, Objective, Schedule, check_weights


class OnePass(Schedule):
    """Σ_k w_k · loss(prefix k), every prefix state coming out of the same n branch evaluations.

    Costs n branch evaluations and n heads per batch, against n(n+1)/2 + n for the published cycle.

    Args:
        parts, annealing: see `Schedule`.
        prefix_weights: w_1 … w_n, normalised to sum 1; equal by default.
        detach: each loss trains only the newest branch of its prefix (boosting), besides stem and head.

    >>> OnePass(["stem", "branch1", "branch2", "head"], Annealing(), prefix_weights=[1, 3]).objectives(0)
    (Objective(prefix=2, weights=(1.0, 3.0), detach=False, clip=True),)
    """

    name = "one_pass"

    def __init__(
        self,
        parts: Sequence[str],
        annealing: Annealing,
        *,
        prefix_weights: Sequence[float] | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__(parts, annealing)
        self.weights = check_weights(prefix_weights, self.branches)
        self.detach = detach

    def objectives(self, pass_index: int) -> tuple[Objective, ...]:
        return (Objective(self.branches, weights=self.weights, detach=self.detach),)
