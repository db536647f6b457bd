"""Commands that use a trained model: predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import Commands, parse
from paradepth.models import from_pretrained


@dataclass(frozen=True)
class _Predict:
    """Classify image files."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder with config.json and model.safetensors."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    branches: int | None = None
    """Use the first K branches only."""
    top: int = 1
    """How many classes to name for each image."""
    json: bool = False
    """Print the result as one JSON object."""


def _predict(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.train.use import predict_images

    o = parse(_Predict, options, "predict")
    model = from_pretrained(o.run)
    return {"predictions": predict_images(model, o.images, branches=o.branches, top=o.top)}


COMMANDS: Commands = {
    "predict": (_predict, "classify image files"),
}
