"""Branches are activated one after another, each correcting what the earlier ones left.

progress  0 ─── 1/6 ───────── 1/2 ──────────────── 1
branch 1  ▁▆████▇▇▇▇▆▆▆▆▅▅▅▅▄▄▄▄▃▃▃▃▂▂▂▂▂▁▁▁▁▁     predecessors go on learning (free), slowly, or not at all
branch 2          ▇▇▇▆▆▆▆▅▅▅▅▄▄▄▄▃▃▃▃▂▂▂▂▂▁▁▁▁▁
branch 3                        ▄▄▃▃▃▃▂▂▂▂▂▁▁▁▁▁     stage k has k parts of the budget: equal numbers of steps
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from paradepth.models.sharing import check_starts_at_zero
from paradepth.train.schedules.base import Annealing, Objective, Schedule, check_weights

Predecessors = Literal["free", "slow", "frozen"]


class Stagewise(Schedule):
    """Stage k trains prefix k; branch k+1 joins when stage k is over.

    Source: ParaFormer (arXiv 2510.15425), which fine-tunes earlier branches and gives no criterion for "converged
    sufficiently". Here a stage ends at its fixed point of the budget or sooner, with `advance_on="plateau"`, when the
    validation loss of the active prefix has not improved by `min_delta` for `patience` validations; later stages share
    the budget that it leaves.

    Args:
        parts, annealing: see `Schedule`.
        advance_on: "fixed" or "plateau".
        advance_at: the n−1 parts of the budget, increasing, at which stages end. By default stage k has k shares: a
            step of it costs k branches, so in a budget of layer evaluations every stage has about as many steps.
        patience, min_delta: of the plateau.
        predecessors: "free" learn at the full rate, "slow" at `slow_factor` of it, "frozen" not at all, nor does the
            stem: the frozen prefix is evaluated without gradients.
        slow_factor: rate of slowed predecessors and the stem.
        new_branch: "zero" starts a branch with zero output projections, so that the loss cannot jump; "random" as in
            the paper.
        anneal: one warm-up and decay over the "run", or one for each "stage".
        prefix_losses: train on the losses of all active prefixes, from one evaluation, not the newest one's alone.
        prefix_weights, detach: of those losses, as in `OnePass`.

    Raises:
        ValueError: values outside the ranges above, or options that do not go together.

    >>> schedule = Stagewise(["stem", "branch1", "branch2", "head"], Annealing())
    >>> schedule.active, schedule.advance(0.34), schedule.active
    (1, 'fixed', 2)
    """

    name = "stagewise"

    def __init__(
        self,
        parts: Sequence[str],
        annealing: Annealing,
        *,
        advance_on: Literal["fixed", "plateau"] = "fixed",
        advance_at: Sequence[float] | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        predecessors: Predecessors = "free",
        slow_factor: float = 0.1,
        new_branch: Literal["zero", "random"] = "zero",
        anneal: Literal["stage", "run"] = "run",
        prefix_losses: bool = False,
        prefix_weights: Sequence[float] | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__(parts, annealing)
        for option, value, allowed in (
            ("advance_on", advance_on, ("fixed", "plateau")),
            ("predecessors", predecessors, ("free", "slow", "frozen")),
            ("new_branch", new_branch, ("zero", "random")),
            ("anneal", anneal, ("stage", "run")),
        ):
            if value not in allowed:
                raise ValueError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"patience is {patience} and min_delta {min_delta}; they must be at least 1 and at least 0"
            )
        if not 0 < slow_factor <= 1:
            raise ValueError(f"slow_factor is {slow_factor}; it must be above 0 and at most 1")
        if not prefix_losses and (prefix_weights is not None or detach):
            raise ValueError("prefix_weights and detach are about prefix losses; set prefix_losses as well")
        if advance_on == "plateau" and advance_at is not None:
            raise ValueError("advance_at gives fixed points, so it does not go with advance_on='plateau'")
        if advance_at is not None:
            points = [0.0, *advance_at, 1.0]
            if len(advance_at) != self.branches - 1 or any(a >= b for a, b in itertools.pairwise(points)):
                raise ValueError(
                    f"advance_at is {tuple(advance_at)}; it needs {self.branches - 1} increasing parts of the budget "
                    "between 0 and 1"
                )
        self.advance_on, self.patience, self.min_delta = advance_on, patience, min_delta
        self.advance_at = None if advance_at is None else tuple(advance_at)
        self.predecessors, self.slow_factor, self.new_branch, self.anneal = (
            predecessors,
            slow_factor,
            new_branch,
            anneal,
        )
        self.weights = check_weights(prefix_weights, self.branches) if prefix_losses else None
        self.detach = detach
        self._active = 1
        self._start = 0.0
        self._best = float("inf")
        self._waited = 0

    @property
    def active(self) -> int:
        return self._active

    @property
    def end(self) -> float:
        """Progress at which the present stage ends at the latest."""
        if self._active == self.branches:
            return 1.0
        if self.advance_at is not None:
            return self.advance_at[self._active - 1]
        left = sum(range(self._active, self.branches + 1))
        return self._start + (1.0 - self._start) * self._active / left

    def prepare(self, model: nn.Module) -> None:
        if self.branches == 1 or self.new_branch == "random":
            return
        if model.config.aggregate == "sum":  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                "aggregate 'sum' adds the input once per branch, so no branch can start at zero; set new_branch=random"
            )
        config: Any = model.config
        check_starts_at_zero(config.share, "new_branch=random")
        for part in list(model.parts().values())[2:-1]:  # pyright: ignore[reportCallIssue]
            part.zero_output_()

    def objectives(self, pass_index: int) -> tuple[Objective, ...]:
        weights = None if self.weights is None else self.weights[: self._active]
        return (Objective(self._active, weights=weights, detach=self.detach),)

    def _slow_parts(self) -> tuple[str, ...]:
        return self.parts[: self._active] if self._active > 1 else ()  # the stem and every active branch but the newest

    def rates(self, progress: float) -> dict[str, float]:
        span = progress if self.anneal == "run" else (progress - self._start) / max(self.end - self._start, 1e-12)
        rates = dict.fromkeys(self.parts, self.annealing(span))
        factor = {"free": 1.0, "slow": self.slow_factor, "frozen": 0.0}[self.predecessors]
        for part in self._slow_parts():
            rates[part] *= factor
        return {part: rate if part in self.trainable() else 0.0 for part, rate in rates.items()}

    def trainable(self) -> frozenset[str]:
        waiting = self.parts[self._active + 1 : -1]
        frozen = self._slow_parts() if self.predecessors == "frozen" else ()
        return frozenset(self.parts) - set(waiting) - set(frozen)

    def advance(self, progress: float, validation_loss: float | None = None) -> str | None:
        if self._active == self.branches:
            return None
        reason = "fixed" if progress >= self.end else None
        if validation_loss is not None and self.advance_on == "plateau":
            if validation_loss < self._best - self.min_delta:
                self._best, self._waited = validation_loss, 0
            else:
                self._waited += 1
            if self._waited >= self.patience:
                reason = "plateau"
        if reason is not None:
            self._active += 1
            self._start, self._best, self._waited = progress, float("inf"), 0
        return reason

    def state_dict(self) -> dict[str, Any]:
        best = None if self._best == float("inf") else self._best
        return {"active": self._active, "start": self._start, "best": best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._active, self._start, self._waited = state["active"], state["start"], state["waited"]
        self._best = float("inf") if state["best"] is None else state["best"]
