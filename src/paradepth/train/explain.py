"""Explanation of a finished run: its closed form over samples of a split.

Shapes: none of its own; samples are what the task's model takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paradepth.atomic import write_json
from paradepth.distributed import join_world
from paradepth.models import TrunkModel, from_pretrained
from paradepth.theory import Explanation, check_closed_form, explain
from paradepth.train.run import read_run_config
from paradepth.train.tasks import Task, load_data

FILE = "explanation.json"
BATCH = 32  # samples at a time: a closed form holds the operators of every layer


def explain_run(
    run_dir: str | Path,
    *,
    samples: int = 128,
    split: str = "validation",
    branches: int | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
) -> tuple[Explanation, Path]:
    """Explains the model of a finished run on samples of its data; writes `explanation.json`.

    Args:
        run_dir: the run.
        samples: how many, evenly spread over the split; all where it has fewer.
        split: "validation", "test" or another split that the data have.
        branches: use the first branches only (default: all).
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".

    Returns:
        The explanation and the file.

    Raises:
        ValueError: not a finished run, a model without a closed form (a translator, an encoder of another library, a
            quantised one), fewer than two samples, no such split, no data, or several processes.
    """
    config = read_run_config(run_dir)
    model: TrunkModel = from_pretrained(run_dir)
    check_closed_form(model.eval())
    if branches is not None:
        model = model.truncate(branches)
    if samples < 2:
        raise ValueError(f"samples is {samples}; variation over inputs needs at least 2")
    if data_dir is not None:
        config = config.replace(data_dir=data_dir)
    with join_world(device) as world:
        if world.processes > 1:
            raise ValueError(f"a run is explained by one process, and there are {world.processes}")
        task = load_data(config, assets=Path(run_dir)).to(world.device)
        found = explain(model.to(world.device), chosen_batches(task, split, samples))
    path = Path(run_dir) / FILE
    write_json(path, {"split": split, **found.to_dict()})
    return found, path


def chosen_batches(task: Task, split: str, samples: int) -> list[Any]:
    """Batches of the model's inputs for `samples` samples of a split, evenly spread over it.

    Raises:
        ValueError: the data have no such split, or fewer than two samples in it.
    """
    count = task.count(split) if split in task.splits else 0
    if count < 2:
        raise ValueError(f"data {task.data.name!r} has {count} samples in a split {split!r}; at least 2 are needed")
    total = min(samples, count)
    sizes = [min(BATCH, total - first) for first in range(0, total, BATCH)]
    gap = (count - total) // max(len(sizes) - 1, 1)
    starts = [number * (BATCH + gap) for number in range(len(sizes))]
    return [task.ordered(split, start, start + size)[0] for start, size in zip(starts, sizes, strict=True)]
