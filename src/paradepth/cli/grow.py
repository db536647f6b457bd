"""Command that makes a trained model larger: grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tyro

from paradepth.cli.parse import FLAT, Commands, parse
from paradepth.train.config import Config, DataOptions, OptimiserOptions, RunOptions, ScheduleOptions

_HINTS = get_type_hints(RunOptions)
# --init is about new branches here; where the weights come from is the run that grows.
_RunOptions: Any = make_dataclass(
    "_RunOptions",
    [(f.name, _HINTS[f.name], field(default=f.default)) for f in fields(RunOptions) if f.name != "init"],
    frozen=True,
    namespace={"__doc__": RunOptions.__doc__},
)


@dataclass(frozen=True)
class _Grow:
    """Make a larger model of a finished run: new branches, which change no prediction until they are trained, new
    classes, or both. Writes a new run, which `paradepth resume OUT` trains; it can be evaluated before. Any training
    option can be given."""

    run: tyro.conf.Positional[Path]
    """Run directory; it is left alone."""
    branches: int = 0
    """Branches to add: +1, +2 …"""
    depth: int | None = None
    """Layers of each new branch; as many as the first one has by default."""
    classes: tuple[str, ...] = ()
    """Names of classes to add."""
    old: Literal["frozen", "slowed", "free"] = "frozen"
    """What the old parts do: frozen, the old model can be had back bit for bit; slowed, stem and branches learn at
    --slow-rate of the rate; free."""
    init: Literal["zero", "random"] = "zero"
    """New branches: zero, outputs do not change until they are trained; random, as the paper has it."""
    out: Path | None = None
    """Folder of the new run; RUN-grown by default."""
    overwrite: bool = False
    """Replace the run that is in that folder."""
    json: bool = False
    """Print the result as one JSON object."""
    data_options: FLAT[DataOptions] = field(default_factory=DataOptions)
    schedule_options: FLAT[ScheduleOptions] = field(default_factory=ScheduleOptions)
    optimiser_options: FLAT[OptimiserOptions] = field(default_factory=OptimiserOptions)
    run_options: FLAT[_RunOptions] = field(default_factory=_RunOptions)  # pyright: ignore[reportInvalidTypeForm]


def _grow(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train.grow import grow_run
    from paradepth.train.run import read_run_config

    if not options or options[0].startswith("-"):
        if options and options[0] in ("-h", "--help"):
            parse(_Grow, options, "grow")
        raise ValueError("grow needs a finished run, for example: paradepth grow runs/fashion --branches +1")
    run = Path(options[0])
    config = read_run_config(run).replace(schedule="joint", init=None, freeze=(), slow=(), slow_rate=0.1)
    groups = config.groups()
    shown = {name: groups[name] for name in ("data_options", "schedule_options", "optimiser_options")}
    values = {f.name: getattr(config.run_options, f.name) for f in fields(_RunOptions)}
    o = parse(_Grow, options, "grow", default=_Grow(run=run, **shown, run_options=_RunOptions(**values)))
    own = {f.name: getattr(o.run_options, f.name) for f in fields(_RunOptions)}
    chosen = Config(**{**groups, **{name: getattr(o, name) for name in shown}}).replace(**own)
    return grow_run(
        o.run,
        o.out or run.with_name(f"{run.name}-grown"),
        branches=o.branches,
        depth=o.depth,
        classes=o.classes,
        old=o.old,
        init=o.init,
        overwrite=o.overwrite,
        options=config.changed(chosen),
    )


COMMANDS: Commands = {
    "grow": (_grow, "add branches or classes to a trained model"),
}
