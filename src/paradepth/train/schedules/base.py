"""What a schedule decides: which loss each optimiser update minimises, and how fast each part of the model learns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn


@dataclass(frozen=True)
class Annealing:
    """Learning-rate factor over a span: linear warm-up, then cosine decay to zero, a constant, or a fall as 1/√t.

    Attributes:
        warmup: part of the span, 0 to below 1, spent warming up; above 0 for "inverse_sqrt", which falls from there.
        decay: "cosine", "constant" or "inverse_sqrt".

    >>> anneal = Annealing(warmup=0.1, decay="cosine")
    >>> [round(anneal(t), 2) for t in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """

    warmup: float = 0.05
    decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a part of the budget, at least 0 and below 1")
        if self.decay not in ("cosine", "constant", "inverse_sqrt"):
            raise ValueError(f"decay is {self.decay!r}; it must be 'cosine', 'constant' or 'inverse_sqrt'")
        if self.decay == "inverse_sqrt" and self.warmup == 0:
            raise ValueError("warmup is 0; decay 'inverse_sqrt' falls from the end of the warm-up, so it needs one")

    def __call__(self, t: float) -> float:
        """The factor, in [0, 1], at the part `t` of the span."""
        t = min(max(t, 0.0), 1.0)
        if t < self.warmup:
            return t / self.warmup
        if self.decay == "constant":
            return 1.0
        if self.decay == "inverse_sqrt":
            return math.sqrt(self.warmup / t)
        return 0.5 * (1.0 + math.cos(math.pi * (t - self.warmup) / (1.0 - self.warmup)))


@dataclass(frozen=True)
class Objective:
    """The loss of one optimiser update.

    Attributes:
        prefix: number k of branches that are evaluated.
        weights: weight of the loss of each prefix 1..k (they are normalised to sum 1); None is the loss of prefix k
            alone.
        detach: earlier prefixes are constants for later ones (boosting).
        clip: whether the gradient norm is clipped.
    """

    prefix: int
    weights: tuple[float, ...] | None = None
    detach: bool = False
    clip: bool = True

    def __post_init__(self) -> None:
        assert self.prefix >= 1
        assert self.weights is None or len(self.weights) == self.prefix


class Schedule(ABC):
    """Decides what is trained when. A schedule sees progress (the part of the budget spent) and validation losses,
    never data.

    Args:
        parts: names of the model's parts in order: "stem", the branches (or "trunk"), "head".
        annealing: learning-rate factor over a span.
    """

    name: ClassVar[str]

    def __init__(self, parts: Sequence[str], annealing: Annealing) -> None:
        self.parts = tuple(parts)
        self.branches = len(parts) - 2
        self.annealing = annealing

    @property
    def active(self) -> int:
        """Number of branches in use."""
        return self.branches

    @property
    def passes_per_epoch(self) -> int:
        """Passes over the data that make one epoch of this schedule."""
        return 1

    def prepare(self, model: nn.Module) -> None:
        """Initialises parts of a fresh model as the schedule wants them."""
        return

    @abstractmethod
    def objectives(self, pass_index: int) -> tuple[Objective, ...]:
        """The updates made on each batch of the given pass over the data, in order."""

    def rates(self, progress: float) -> dict[str, float]:
        """Learning-rate factor of every part at `progress` in [0, 1]."""
        return dict.fromkeys(self.parts, self.annealing(progress))

    def trainable(self) -> frozenset[str]:
        """Parts that learn at all; the others need no gradients."""
        return frozenset(self.parts)

    def advance(self, progress: float, validation_loss: float | None = None) -> str | None:
        """Moves to the next stage if it is time, and then says why ("fixed" or "plateau").

        Called before every batch with the progress, and after every validation with the loss of the active prefix as
        well.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        assert not state


def check_weights(weights: Sequence[float] | None, branches: int) -> tuple[float, ...]:
    """The prefix weights, equal ones by default.

    Raises:
        ValueError: not one for each branch, negative, or zero for the full model.
    """
    if weights is None:
        return (1.0,) * branches
    if len(weights) != branches or min(weights) < 0 or weights[-1] <= 0:
        raise ValueError(
            f"prefix_weights is {tuple(weights)}; it needs {branches} numbers (one for each branch), "
            "none negative, the last positive"
        )
    return tuple(float(w) for w in weights)
