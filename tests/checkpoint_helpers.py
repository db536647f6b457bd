"""What the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import torch

from paradepth.train.checkpoint import CheckpointStore


def save(store: CheckpointStore, *steps: int, value: float | None = None) -> None:
    """Save checkpoints that hold their step, or `value`."""
    for step in steps:
        tensors = {"w": torch.full((64,), float(step if value is None else value))}
        store.save(step, tensors, {"step": step, "value": value})


def silent(message: str) -> None:
    """A listener for reports where there should be none."""
    raise AssertionError(f"nothing should be reported, but: {message}")


def hidden(folder: Path) -> list[str]:
    """What is in the folder besides checkpoints."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("step-"))
