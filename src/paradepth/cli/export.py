"""Command that exports a trained model: export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from paradepth.cli.parse import Commands, parse


@dataclass(frozen=True)
class _Export:
    """Export the model of a run: as an ONNX file, as a program of torch.export, or compiled by AOTInductor. It is
    compared with PyTorch before it is written, and timed."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder with config.json and model.safetensors."""
    format: Literal["onnx", "torch", "aoti"] = "onnx"
    """onnx: an ONNX file, which `paradepth predict` takes. torch: a program of torch.export (.pt2). aoti: machine code
    for this kind of processor (.pt2), which needs a C++ compiler to be made."""
    branches: int | None = None
    """Export the first K branches only."""
    prefixes: bool = False
    """One output for each number of branches, in one file."""
    output: Path | None = None
    """File to write; in RUN/exported by default."""
    overwrite: bool = False
    """Replace the file if it exists."""
    latency: bool = True
    """Measure latencies, for a few seconds."""
    threads: int | None = None
    """Threads of the measurement; all by default."""
    json: bool = False
    """Print the result as one JSON object."""


def _export(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.export import export_run

    o = parse(_Export, options, "export")
    return export_run(
        o.run,
        format=o.format,
        branches=o.branches,
        prefixes=o.prefixes,
        output=o.output,
        overwrite=o.overwrite,
        latency=o.latency,
        threads=o.threads,
    )


COMMANDS: Commands = {
    "export": (_export, "write a trained model as ONNX, torch.export or AOTInductor"),
}
