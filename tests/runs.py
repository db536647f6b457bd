"""Small real runs for tests: digits, a tiny ParaFormer, every source of randomness switched on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paradepth.train import Config

SCHEDULES: dict[str, dict[str, Any]] = {
    "joint": {"schedule": "joint"},
    "cycle": {"schedule": "cycle"},
    "one_pass": {"schedule": "one_pass", "detach": True},
    "stagewise": {"schedule": "stagewise", "predecessors": "slow"},
    "stagewise-plateau": {"schedule": "stagewise", "advance_on": "plateau", "patience": 1, "min_delta": 0.2},
    "stagewise-frozen": {
        "schedule": "stagewise",
        "predecessors": "frozen",
        "prefix_losses": True,
        "new_branch": "random",
    },
}


class Stop(Exception):
    """Raised by `stop_at`."""


def stop_at(wanted: int) -> Callable[[int], None]:
    """An `on_batch` that breaks a run off after a step, between two checkpoints."""

    def stop(step: int) -> None:
        if step == wanted:
            raise Stop

    return stop


def tiny_config(kind: str = "joint", **options: Any) -> Config:
    """Three branches of one layer on digits for 24 steps; `options` replace anything."""
    chosen: dict[str, Any] = {
        "model": "paraformer_nano",
        "branches": 3,
        "depth": 1,
        "patch_size": 4,
        "data": "digits",
        "budget": "24 steps",
        "batch_size": 32,
        "dropout": 0.1,
        "crop_padding": 1,
        "flip": True,
        "validations": 6,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        **SCHEDULES[kind],
        **options,
    }
    return Config().replace(**chosen)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind of a run's metrics, without wall-clock times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "samples_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["event"] == kind]
