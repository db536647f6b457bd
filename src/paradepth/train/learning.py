"""What learns how fast: a schedule's answer, with the parts that the user slowed down or froze."""

from __future__ import annotations

from collections.abc import Sequence

from paradepth.train.config import OptimiserOptions
from paradepth.train.schedules import Schedule

_GROUPS = ("stem", "trunk", "head")


def check_parts(options: OptimiserOptions, parts: Sequence[str]) -> None:
    """Refuses to freeze parts that the model does not have, or all of them.

    Args:
        options: with `freeze`.
        parts: of the model: "stem", the branches or "trunk", "head".

    Raises:
        ValueError: naming the part and what is allowed.
    """
    allowed = [*parts, *(["trunk"] if "trunk" not in parts else [])]
    for name in options.freeze:
        if name not in allowed:
            raise ValueError(f"freeze names {name!r}; this model's parts are {', '.join(allowed)}")
    if len(frozen(options, parts)) == len(parts):
        raise ValueError(f"freeze is {', '.join(options.freeze)}, which leaves nothing to learn")


def frozen(options: OptimiserOptions, parts: Sequence[str]) -> frozenset[str]:
    """The parts that `freeze` names; "trunk" stands for all branches.

    >>> sorted(frozen(OptimiserOptions(freeze=("stem", "trunk")), ["stem", "branch1", "branch2", "head"]))
    ['branch1', 'branch2', 'stem']
    """
    return frozenset(p for p in parts if p in options.freeze or (p not in _GROUPS and "trunk" in options.freeze))


def trainable(schedule: Schedule, options: OptimiserOptions) -> frozenset[str]:
    """Parts that learn in the schedule's present stage."""
    return schedule.trainable() - frozen(options, schedule.parts)


def rates(schedule: Schedule, options: OptimiserOptions, progress: float) -> dict[str, float]:
    """Learning-rate factor of every part at `progress` in [0, 1]."""
    factors = options.part_rates()
    return {
        part: rate * factors[part if part in _GROUPS else "trunk"] for part, rate in schedule.rates(progress).items()
    }
