"""Command that says what a trained model computes: explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import Commands, parse, with_report


@dataclass(frozen=True)
class _Explain:
    """Look at a trained model through its closed form: how much the operators of its layers and branches differ from
    input to input, their spectra and effective ranks, and each branch's share of the final logits. Writes
    explanation.json and explanation.html into the run directory, and a section of its report."""

    run: tyro.conf.Positional[Path]
    """Run directory of a finished run."""
    samples: int = 128
    """Samples to look at, spread over the split."""
    split: str = "validation"
    """Which split: validation, test or train."""
    branches: int | None = None
    """Use the first K branches only."""
    data_dir: Path | None = None
    """Where the data lies now, if it moved since training."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the result as one JSON object."""


def _explain(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train.explain import explain_run

    o = parse(_Explain, options, "explain")
    found, path = explain_run(
        o.run, samples=o.samples, split=o.split, branches=o.branches, data_dir=o.data_dir, device=o.device
    )
    page = found.plot(path.with_suffix(".html"))
    result = {"run": str(o.run), "explanation": str(path), "plots": str(page), **found.to_dict()}
    return with_report(result)


COMMANDS: Commands = {
    "explain": (_explain, "say how input-dependent a trained model is and what its branches do"),
}
