"""Options of a continual run, besides those of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from paradepth.continual.memory import Policy
from paradepth.continual.scenario import Setting, check_scenario
from paradepth.continual.strategy import STRATEGIES

StrategyName = Literal["finetune", "replay", "grow", "grow_replay", "joint"]


@dataclass(frozen=True)
class ContinualOptions:
    """What is learned in which order, and what is done about forgetting.

    Attributes:
        scenario: sequence of tasks, by name.
        setting: class, any class so far may come; task, it is known which task a sample is of; domain, the same
            classes in other images.
        strategy: finetune; replay, with a memory; grow, a branch for every task with the rest frozen; grow_replay, with
            a memory; joint, the ceiling.
        memory: samples of earlier tasks that are kept, in all; of strategies that replay.
        policy: balanced, equally many of every class; reservoir, a uniform sample of the stream.
        new_depth: grow: layers of each new branch; None: as many as the first one has.

    Raises:
        ValueError: values that are unknown or out of range, or that mean nothing to the strategy.
    """

    scenario: str = "split_digits"
    setting: Setting = "class"
    strategy: StrategyName = "grow_replay"
    memory: int | None = None
    policy: Policy | None = None
    new_depth: int | None = None

    def __post_init__(self) -> None:
        check_scenario(self.scenario, self.setting)
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; it must be one of {', '.join(STRATEGIES)}")
        chosen = STRATEGIES[self.strategy]
        if self.policy not in (None, *get_args(Policy)):
            raise ValueError(f"policy is {self.policy!r}; it must be one of {', '.join(get_args(Policy))}")
        for name, value, used in (
            ("memory", self.memory, chosen.replays),
            ("policy", self.policy, chosen.replays),
            ("new_depth", self.new_depth, chosen.grows),
        ):
            if value is not None and not used:
                raise ValueError(f"{name} is {value!r}; it means nothing to strategy {self.strategy!r}")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def capacity(self) -> int:
        """Samples that are kept: `memory`, 500 where nothing is said; 0 where nothing is replayed."""
        return (self.memory or 500) if STRATEGIES[self.strategy].replays else 0
