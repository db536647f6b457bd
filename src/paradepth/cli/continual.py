"""Command that learns tasks one after another: continual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import FLAT, Commands, parse
from paradepth.continual.memory import Policy
from paradepth.continual.options import StrategyName
from paradepth.continual.scenario import SCENARIOS, Setting
from paradepth.train.config import Config, DataOptions, ModelOptions, OptimiserOptions, RunOptions

_GROUPS = ("model_options", "data_options", "optimiser_options", "run_options")


@dataclass(frozen=True)
class _Continual:
    """Learn the tasks of a scenario one after another, and measure after each what is left of the earlier ones. The
    budget is that of one task. Any option of model, data and optimiser can be given."""

    scenario: tyro.conf.Positional[str]
    """split_cifar100, split_cifar10, split_fashion_mnist, split_mnist, split_digits; of domains clothes_digits,
    clothes_digits_photos."""
    setting: Setting | None = None
    """class: any class so far may come, the default of the splits; task: it is known which task a sample is of;
    domain: the same outputs for other images, the default of the domains."""
    strategy: StrategyName = "grow_replay"
    """finetune; replay, with a memory; grow, a branch for every task and the rest frozen; grow_replay, with a memory;
    joint, all samples of all tasks so far: the ceiling."""
    memory: int | None = None
    """Samples of earlier tasks that replaying strategies keep, in all; 500 by default."""
    policy: Policy | None = None
    """What is kept: balanced, equally many of every class (the default), or reservoir, a uniform sample."""
    new_depth: int | None = None
    """Layers of the branch that a task gets; as many as the first one has by default."""
    run_dir: Path | None = None
    """Run directory; runs/SCENARIO-STRATEGY by default."""
    overwrite: bool = False
    """Replace the run that is in the run directory."""
    json: bool = False
    """Print the result as one JSON object."""
    model_options: FLAT[ModelOptions] = field(default_factory=ModelOptions)
    data_options: FLAT[DataOptions] = field(default_factory=DataOptions)
    optimiser_options: FLAT[OptimiserOptions] = field(default_factory=OptimiserOptions)
    run_options: FLAT[RunOptions] = field(default_factory=RunOptions)


def _defaults(scenario: str) -> Config:
    """Options that suit the size of a scenario's images."""
    sets, _ = SCENARIOS.get(scenario, (("digits",), 0))
    patch = {"digits": 4, "cifar10": 8, "cifar100": 8}.get(sets[0], 7)
    return Config().replace(
        recipe=f"continual_{scenario}",
        data=sets[0],
        patch_size=patch,
        budget="2e4 layer_evals",
        batch_size=64,
        learning_rate=2e-3,
        warmup=0.1,
    )


def _continual(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.continual import ContinualOptions, continual_run

    usage = f"usage: paradepth continual SCENARIO [--option value …], SCENARIO one of {', '.join(SCENARIOS)}"
    if not options or (options[0].startswith("-") and options[0] not in ("-h", "--help")):
        print(usage)
        raise ValueError("continual needs a scenario, for example: paradepth continual split_digits")
    start = _defaults(options[0])
    groups = {name: group for name, group in start.groups().items() if name in _GROUPS}
    o = parse(_Continual, options, "continual", default=_Continual(scenario=tyro.MISSING, **groups))
    config = start.replace(**start.changed(Config(**{name: getattr(o, name) for name in _GROUPS})))
    sets, _ = SCENARIOS.get(o.scenario, (("",), 0))
    if o.data_options.data != start.data_options.data:
        raise ValueError(f"data follows from the scenario, which is {o.scenario!r}; leave it out")
    own = {f.name: getattr(o, f.name) for f in fields(ContinualOptions)}
    own["setting"] = o.setting or ("domain" if len(sets) > 1 else "class")
    folder = o.run_dir or Path("runs") / f"{o.scenario}-{o.strategy}"
    return continual_run(config, ContinualOptions(**own), folder, overwrite=o.overwrite)


COMMANDS: Commands = {
    "continual": (_continual, "learn tasks one after another, and measure what is forgotten"),
}
