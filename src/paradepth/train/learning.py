"""What learns how fast: a schedule's answer, with the parts that the user slowed down or froze.

Shapes: N classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.train.config import OptimiserOptions
from paradepth.train.schedules import Schedule

_GROUPS = ("stem", "trunk", "head")


def check_parts(options: OptimiserOptions, parts: Sequence[str], *, classes: int = 0) -> None:
    """Refuses to freeze or slow down parts that the model does not have, or to freeze all of them.

    Args:
        options: with `freeze` and `slow`.
        parts: of the model: "stem", the branches or "trunk", "head".
        classes: N of a classifier; 0 of other models.

    Raises:
        ValueError: naming the part and what is allowed.
    """
    allowed = [*parts, *(["trunk"] if "trunk" not in parts else [])]
    held = held_classes(options)
    for option, names in (("freeze", options.freeze), ("slow", options.slow)):
        for name in names:
            if name in allowed or (option == "freeze" and held is not None and name == f"head:{held}"):
                continue
            raise ValueError(f"{option} names {name!r}; this model's parts are {', '.join(allowed)}")
    if held is not None and not 1 <= held < max(classes, 1):
        raise ValueError(
            f"freeze names 'head:{held}', a head but for the classes behind its first {held}; "
            + (f"this model has {classes}" if classes else "this model is no classifier")
        )
    both = sorted({name.partition(":")[0] for name in options.freeze} & set(options.slow))
    if both:
        raise ValueError(f"{', '.join(both)} cannot be both frozen and slow")
    if len(frozen(options, parts)) == len(parts):
        raise ValueError(f"freeze is {', '.join(options.freeze)}, which leaves nothing to learn")


def frozen(options: OptimiserOptions, parts: Sequence[str]) -> frozenset[str]:
    """The parts that `freeze` names; "trunk" stands for all branches.

    >>> sorted(frozen(OptimiserOptions(freeze=("stem", "trunk")), ["stem", "branch1", "branch2", "head"]))
    ['branch1', 'branch2', 'stem']
    """
    return frozenset(p for p in parts if p in options.freeze or (p not in _GROUPS and "trunk" in options.freeze))


def held_classes(options: OptimiserOptions) -> int | None:
    """How many classes of the head stay as they are while those behind them learn; None: the head is treated as one.

    >>> held_classes(OptimiserOptions(freeze=("stem", "head:10")))
    10
    """
    found = [match for name in options.freeze if (match := re.fullmatch(r"head:(\d+)", name))]
    return int(found[-1][1]) if found else None


class HeldClasses:
    """What stays of a head while new classes are learned: the rows of the first ones, and what all classes share.

    An optimiser moves a parameter as a whole, by momentum and weight decay even where its gradient is zero. So the rows
    are put back after each update, bit for bit.

    Args:
        head: a classifier's.
        classes: number of the first classes, which stay.
    """

    def __init__(self, head: Any, classes: int) -> None:
        rows: list[nn.Parameter] = list(head.classify.parameters())
        self._rows = [(row, row.detach()[:classes].clone()) for row in rows]
        for parameter in head.parameters():
            if all(parameter is not row for row in rows):
                parameter.requires_grad_(False)
                parameter.grad = None

    def clear_gradients(self) -> None:
        """Makes the gradients of what stays zero, so that they do not count in a norm."""
        for parameter, kept in self._rows:
            if parameter.grad is not None:
                parameter.grad[: len(kept)] = 0.0

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what stays."""
        kept: Tensor
        for parameter, kept in self._rows:
            parameter[: len(kept)] = kept


def trainable(schedule: Schedule, options: OptimiserOptions) -> frozenset[str]:
    """Parts that learn in the schedule's present stage."""
    return schedule.trainable() - frozen(options, schedule.parts)


def rates(schedule: Schedule, options: OptimiserOptions, progress: float) -> dict[str, float]:
    """Learning-rate factor of every part at `progress` in [0, 1]."""
    factors = options.part_rates()
    found = {}
    for part, rate in schedule.rates(progress).items():
        group = part if part in _GROUPS else "trunk"
        slow = part in options.slow or group in options.slow
        found[part] = rate * factors[group] * (options.slow_rate if slow else 1.0)
    return found
