"""One way to shrink a model, with its setting, and plans: several of them in a row.

A plan is written `prefix=2+distil=300+int8`: its steps from left to right, joined by "+".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch

from paradepth.models import TrunkModel

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@dataclass(frozen=True)
class Step(ABC):
    """A way to shrink a model. This base is one without a setting, such as "int8"; `CountStep` has a number.

    Attributes:
        name: what it is called in a plan.
        last: nothing can follow it.
    """

    name: ClassVar[str]
    last: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, setting: str | None) -> Self:
        """The step with a setting as it is written behind the "=", None where there is none; the inverse of `str`.

        Raises:
            ValueError: no such setting.
        """
        if setting is not None:
            raise ValueError(f"{cls.name} has no setting, so {cls.name}={setting} cannot be; write {cls.name}")
        return cls()

    def check(self, model: TrunkModel) -> None:
        """Refuses a model that the step does not fit, before any work.

        Raises:
            ValueError: what does not fit, and what would.
        """
        return

    def shape(self, config: Any) -> Any:
        """The configuration that a model of this configuration has after the step."""
        return config

    @abstractmethod
    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        """A new model, in evaluation mode; the given one is left alone.

        Raises:
            ValueError: what `check` refuses.
        """


@dataclass(frozen=True)
class CountStep(Step):
    """A step whose setting is a whole number.

    Attributes:
        count: at least 1.

    Raises:
        ValueError: less than that.
    """

    count: int
    counted: ClassVar[str]  # what the number is a number of

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.name} is {self.count}; it is a number of {self.counted}, at least 1")

    def __str__(self) -> str:
        return f"{self.name}={self.count}"

    @classmethod
    def parse(cls, setting: str | None) -> Self:
        if setting is None:
            raise ValueError(f"{cls.name} needs a number of {cls.counted}: {cls.name}=1, say")
        try:
            return cls(int(setting))
        except ValueError as error:
            if setting.strip().lstrip("+-").isdecimal():
                raise
            raise ValueError(f"{cls.name} is {setting!r}; it must be a whole number of {cls.counted}") from error


Plan = tuple[Step, ...]
STEPS: dict[str, type[Step]] = {}
"""The steps by name."""

_S = TypeVar("_S", bound=type[Step])


def register(cls: _S) -> _S:
    """Class decorator: makes plans know a step."""
    assert cls.name not in STEPS, f"step {cls.name} is registered twice"
    STEPS[cls.name] = cls
    return cls


def parse_plan(text: str) -> Plan:
    """The steps that a plan names.

    Args:
        text: steps from left to right, joined by "+".

    Raises:
        ValueError: an unknown step, a setting that is none, or a step behind one that has to be the last.

    >>> import paradepth.compress
    >>> plan = parse_plan("prefix=2+distil=300")
    >>> [type(step).__name__ for step in plan], plan_text(plan)
    (['Prefix', 'Distil'], 'prefix=2+distil=300')
    >>> parse_plan("prefx=2")
    Traceback (most recent call last):
    ValueError: unknown step 'prefx' (did you mean 'prefix'?) in 'prefx=2'; known are ...
    """
    plan: list[Step] = []
    for part in text.split("+"):
        name, equals, setting = part.strip().partition("=")
        if name not in STEPS:
            close = get_close_matches(name, STEPS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown step {name!r}{hint} in {text!r}; known are {', '.join(sorted(STEPS))}")
        plan.append(STEPS[name].parse(setting if equals else None))
    check_order(plan)
    return tuple(plan)


def plan_text(plan: Sequence[Step]) -> str:
    """The plan as `parse_plan` reads it."""
    return "+".join(str(step) for step in plan)


def check_order(plan: Sequence[Step]) -> None:
    """Refuses an empty plan, and steps behind one that has to be the last.

    Raises:
        ValueError: naming both steps.
    """
    if not plan:
        raise ValueError("the plan is empty; it must have at least one step")
    for step, after in pairwise(plan):
        if step.last:
            raise ValueError(f"{after} comes after {step} in {plan_text(plan)!r}; {step.name} must be the last step")


def check_plan(plan: Sequence[Step], model: TrunkModel) -> None:
    """Refuses a plan that does not fit a model, before any work: every step is held against the shape that the ones
    before it leave.

    Raises:
        ValueError: what does not fit, or an order that cannot be.

    >>> import paradepth
    >>> model = paradepth.create_model("paraformer_nano", branches=4)
    >>> check_plan(parse_plan("prefix=2+subset=3"), model)
    Traceback (most recent call last):
    ValueError: subset is 3, and the model has 2 branches; it must be between 1 and 2
    """
    check_order(plan)
    for step, before in shapes(plan, model):
        step.check(before)


def shapes(plan: Sequence[Step], model: TrunkModel) -> Iterator[tuple[Step, TrunkModel]]:
    """Every step with a model of the shape that it is given; behind the first change of shape one without weights.

    >>> import paradepth
    >>> model = paradepth.create_model("paraformer_nano", branches=4)
    >>> [(str(step), before.prefixes) for step, before in shapes(parse_plan("prefix=2+tune=9"), model)]
    [('prefix=2', 4), ('tune=9', 2)]
    """
    for step in plan:
        yield step, model
        config = step.shape(model.config)
        if config != model.config:
            with torch.device("meta"):
                model = type(model)(config)


def apply_plan(plan: Sequence[Step], model: TrunkModel, bench: Workbench) -> TrunkModel:
    """The model after all steps; the given one is left alone.

    Raises:
        ValueError: a plan that does not fit the model, before any work.
    """
    check_plan(plan, model)
    for step in plan:
        model = step.apply(model, bench)
    return model
