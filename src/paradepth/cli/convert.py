"""Command that makes branches of a serial stack: convert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from paradepth.cli.parse import Commands, parse, with_report


@dataclass(frozen=True)
class _Convert:
    """Share the layers of a finished run's model out among branches of the same input, and say what that costs before
    and after further training. Writes a finished run, which every other command takes."""

    run: tyro.conf.Positional[Path]
    """Run directory of a finished run; it is left alone."""
    branches: int
    """Number of branches; 1 puts the layers in series again."""
    groups: Literal["consecutive", "interleaved"] = "consecutive"
    """Which layers make a branch: consecutive, the first branch has the first layers; interleaved, they are dealt out
    one by one."""
    tune: int = 0
    """Updates on the targets after conversion."""
    distil: int = 0
    """Updates towards what RUN's model says, and towards the targets, after those of --tune."""
    learning_rate: float | None = None
    """Peak rate of these updates; half of RUN's by default."""
    out: Path | None = None
    """Folder of the new run; RUN-converted by default."""
    overwrite: bool = False
    """Replace the run that is in this folder."""
    data_dir: Path | None = None
    """Where the data lies now, if it moved since training."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the result as one JSON object."""


def _convert(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.compress.convert import convert_run
    from paradepth.train.progress import ProgressView

    o = parse(_Convert, options, "convert")
    result = convert_run(
        o.run,
        branches=o.branches,
        groups=o.groups,
        tune=o.tune,
        distil=o.distil,
        learning_rate=o.learning_rate,
        out=o.out,
        overwrite=o.overwrite,
        data_dir=o.data_dir,
        device=o.device,
        say=ProgressView().say,
    )
    return with_report(result)


COMMANDS: Commands = {
    "convert": (_convert, "make branches of a trained serial model, or the other way round"),
}
