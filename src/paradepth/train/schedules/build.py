"""Schedules by name, with their options checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from paradepth.train.schedules.base import Annealing, Schedule
from paradepth.train.schedules.cycle import Cycle
from paradepth.train.schedules.joint import Joint
from paradepth.train.schedules.one_pass import OnePass
from paradepth.train.schedules.stagewise import Stagewise

SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (Joint, Cycle, OnePass, Stagewise)}
"""The class of each name."""

_S = TypeVar("_S", bound=type[Schedule])


def register_schedule(cls: _S) -> _S:
    """Class decorator: makes a schedule of your own known by its `name`, to training and the command line.

    The options that a run may give it are the keyword-only arguments of its constructor that `ScheduleOptions` has,
    `prefix_weights` or `patience`, say.

    Raises:
        ValueError: it has no name, or one that is taken.

    >>> register_schedule(Joint)
    Traceback (most recent call last):
    ...
    ValueError: there is a schedule 'joint' already; take another name
    """
    name = getattr(cls, "name", None)
    if not name:
        raise ValueError(f"{cls.__name__} has no name; set the class attribute `name`")
    if name in SCHEDULES:
        raise ValueError(f"there is a schedule {name!r} already; take another name")
    SCHEDULES[name] = cls
    return cls


def build_schedule(name: str, parts: Sequence[str], annealing: Annealing, options: Mapping[str, Any]) -> Schedule:
    """The schedule called `name`.

    Args:
        name: "joint", "cycle", "one_pass", "stagewise" or one that was registered.
        parts: the model's parts in order.
        annealing: learning-rate factor.
        options: the schedule's own options; None means "not given".

    Raises:
        ValueError: unknown schedule, an option that this schedule does not take, or a value out of range.

    >>> build_schedule("joint", ["stem", "trunk", "head"], Annealing(), {"detach": True})
    Traceback (most recent call last):
    ...
    ValueError: schedule 'joint' takes no option detach; it takes none
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}")
    cls = SCHEDULES[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ValueError(
            f"schedule {name!r} takes no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    return cls(parts, annealing, **given)
