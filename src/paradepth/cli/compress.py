"""Command that makes a trained model smaller: compress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import Commands, parse, with_report


@dataclass(frozen=True)
class _Compress:
    """Shrink the model of a run in many ways, and measure each: parameters, bytes, operations, latency, accuracy on
    the validation split. With a limit, the point that meets it becomes a run of its own. Run the command again to go on
    with what is missing."""

    run: tyro.conf.Positional[Path]
    """Run directory of a finished run."""
    plans: tuple[str, ...] = ()
    """What to try instead of the default: steps joined by +, such as prefix=2+distil=300+int8. Steps: prefix=K,
    subset=K, merge=K, magnitude=PART, heads=N, neurons=N, tune=UPDATES, distil=UPDATES, int8, int8_dynamic, int4,
    and branches=N or interleaved=N, which make branches of a serial stack."""
    tune_steps: int | None = None
    """Updates of each recovery and distillation of the default plans; 300, or 100 with --quick."""
    quick: bool = False
    """Fewer default plans: prefixes, one degree of pruning, int8."""
    max_size: str | None = None
    """Choose a model of at most so many bytes: 200kB, 1.5MiB, or 0.3x for a part of the full one."""
    max_latency: float | None = None
    """Choose one that takes at most so many milliseconds at batch 1."""
    max_loss_of_accuracy: float | None = None
    """Choose the smallest one that loses at most so many percentage points of validation accuracy. Without this limit
    the most accurate one that meets the others is chosen."""
    out: Path | None = None
    """Folder for the run of the chosen model; RUN-compressed by default."""
    overwrite: bool = False
    """Replace the run that is in this folder."""
    test: bool = False
    """Evaluate the test split for every point of the table, after choosing; without it, for the chosen one only."""
    data_dir: Path | None = None
    """Where the data lies now, if it moved since training."""
    device: str = "auto"
    """auto, cpu or cuda."""
    latency: bool = True
    """Measure latencies, of all points in turns."""
    threads: int | None = None
    """CPU threads of this measurement; all by default."""
    json: bool = False
    """Print the result as one JSON object."""


def _compress(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.compress.run import compress_run
    from paradepth.train.progress import ProgressView

    o = parse(_Compress, options, "compress")
    result = compress_run(
        o.run,
        plans=o.plans,
        tune_steps=o.tune_steps,
        quick=o.quick,
        max_size=o.max_size,
        max_latency=o.max_latency,
        max_loss_of_accuracy=o.max_loss_of_accuracy,
        out=o.out,
        overwrite=o.overwrite,
        test=o.test,
        data_dir=o.data_dir,
        device=o.device,
        latency=o.latency,
        threads=o.threads,
        say=ProgressView().say,
    )
    if "out" in result:
        with_report({"run": result["out"]})
    return with_report(result)


COMMANDS: Commands = {
    "compress": (_compress, "shrink a trained model in many ways, and choose by a limit"),
}
