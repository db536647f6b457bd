"""All options of a training run in one object, to and from JSON, and the refusal of what cannot work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paradepth.train.budget import Budget
from paradepth.train.options import (
    BranchOptions,
    DataOptions,
    DepthOptions,
    ModelOptions,
    OptimiserOptions,
    RunOptions,
    ScheduleOptions,
)

__all__ = [
    "BranchOptions",
    "Config",
    "DataOptions",
    "DepthOptions",
    "ModelOptions",
    "OptimiserOptions",
    "RunOptions",
    "ScheduleOptions",
    "check_options",
]


@dataclass(frozen=True)
class Config:
    """All options of a run; a recipe returns one."""

    recipe: str = "custom"
    model_options: ModelOptions = field(default_factory=ModelOptions)
    data_options: DataOptions = field(default_factory=DataOptions)
    schedule_options: ScheduleOptions = field(default_factory=ScheduleOptions)
    depth_options: DepthOptions = field(default_factory=DepthOptions)
    branch_options: BranchOptions = field(default_factory=BranchOptions)
    optimiser_options: OptimiserOptions = field(default_factory=OptimiserOptions)
    run_options: RunOptions = field(default_factory=RunOptions)

    def changed(self, other: Config) -> dict[str, Any]:
        """The options in which `other` differs from this, with its values.

        >>> Config().changed(Config().replace(seed=3, schedule="cycle"))
        {'schedule': 'cycle', 'seed': 3}
        """
        mine, theirs = (
            {f.name: getattr(group, f.name) for group in c.groups().values() for f in dataclasses.fields(group)}
            for c in (self, other)
        )
        return {name: value for name, value in theirs.items() if value != mine[name]}

    def flat(self) -> dict[str, Any]:
        """All options in one JSON-able dictionary."""
        flat: dict[str, Any] = {"recipe": self.recipe}
        for group in self.groups().values():
            flat |= dataclasses.asdict(group)
        return {key: str(value) if isinstance(value, Path) else value for key, value in flat.items()}

    def groups(self) -> dict[str, Any]:
        """The groups of options by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "recipe"}

    @classmethod
    def from_flat(cls, flat: dict[str, Any]) -> Config:
        """The inverse of `flat`.

        Raises:
            ValueError: unknown options.

        >>> Config.from_flat(Config().flat()) == Config()
        True
        """
        return cls().replace(**flat)

    def replace(self, **options: Any) -> Config:
        """A copy with some options, named without their groups, replaced.

        Another schedule or executor starts from its own defaults, since the options of the present one mean nothing to
        it.

        Raises:
            ValueError: unknown options.

        >>> Config().replace(seed=3, data="mnist").run_options.seed
        3
        """
        left = dict(options)
        recipe = left.pop("recipe", self.recipe)
        groups = {}
        for name, group in self.groups().items():
            own = {f.name for f in dataclasses.fields(group)} & set(left)
            values: dict[str, Any] = {key: left.pop(key) for key in own}
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for place in ("data_dir", "init"):
                if values.get(place) is not None:
                    values[place] = Path(values[place])
            for choice in ("schedule", "executor"):
                if choice in values and values[choice] != getattr(group, choice):
                    group = type(group)()
            groups[name] = dataclasses.replace(group, **values)
        if left:
            raise ValueError(f"unknown options {', '.join(sorted(left))}")
        return Config(recipe=recipe, **groups)


def check_options(config: Config) -> None:
    """Refuses numbers out of range, before any work starts.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    o, r, d = config.optimiser_options, config.run_options, config.data_options
    Budget.parse(o.budget)
    for name, value, ok, allowed in (
        ("batch_size", o.batch_size, o.batch_size >= 1, "at least 1"),
        ("accumulate", o.accumulate, o.accumulate >= 1, "at least 1"),
        ("learning_rate", o.learning_rate, 0 < o.learning_rate < float("inf"), "positive"),
        ("betas", o.betas, len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "two numbers, at least 0, below 1"),
        ("weight_decay", o.weight_decay, 0 <= o.weight_decay < float("inf"), "at least 0"),
        ("clip", o.clip, o.clip >= 0, "at least 0 (0 does not clip)"),
        ("gate_penalty", o.gate_penalty, 0 <= o.gate_penalty < float("inf"), "at least 0"),
        ("label_smoothing", o.label_smoothing, 0 <= o.label_smoothing < 1, "at least 0 and below 1"),
        ("ema", o.ema, 0 <= o.ema < 1, "at least 0 and below 1"),
        *((f"{p}_rate", r, 0 <= r < float("inf"), "at least 0") for p, r in o.part_rates().items()),
        ("decay", o.decay, o.decay in ("cosine", "constant", "inverse_sqrt"), "cosine, constant or inverse_sqrt"),
        ("slow_rate", o.slow_rate, 0 < o.slow_rate < 1, "above 0 and below 1"),
        ("validations", r.validations, r.validations >= 1, "at least 1"),
        ("keep", r.keep, r.keep >= 1, "at least 1"),
        ("timeout", r.timeout, r.timeout > 0, "positive"),
        ("threads", r.threads, r.threads is None or r.threads >= 1, "at least 1"),
        ("checkpoint_every", r.checkpoint_every, r.checkpoint_every is None or r.checkpoint_every >= 1, "at least 1"),
        ("crop_padding", d.crop_padding, d.crop_padding >= 0, "at least 0"),
        ("train_fraction", d.train_fraction, 0 < d.train_fraction <= 1, "above 0 and at most 1"),
        ("seed", r.seed, 0 <= r.seed < 2**31, "between 0 and 2147483647"),
        ("optimiser", o.optimiser, o.optimiser in ("adamw", "muon", "sgd"), "'adamw', 'muon' or 'sgd'"),
        ("momentum", o.momentum, o.momentum is None or 0 <= o.momentum < 1, "at least 0 and below 1"),
        ("precision", r.precision, r.precision in ("auto", "bf16", "float32"), "'auto', 'bf16' or 'float32'"),
    ):
        if not ok:
            raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    if o.momentum is not None and o.optimiser != "sgd":
        raise ValueError(f"momentum is {o.momentum}; it means nothing to optimiser {o.optimiser!r}, only to 'sgd'")
    if o.slow_rate != OptimiserOptions.slow_rate and not o.slow:
        raise ValueError(f"slow_rate is {o.slow_rate}, and no part is slow; name some with slow")
    if o.optimiser == "sgd" and tuple(o.betas) != OptimiserOptions.betas:
        raise ValueError(f"betas are {o.betas}; they mean nothing to optimiser 'sgd', which has a momentum")
