"""Using a finished run: measuring it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from paradepth.distributed import join_world
from paradepth.models import TrunkModel, from_pretrained
from paradepth.train.evaluate import evaluate
from paradepth.train.run import read_run_config
from paradepth.train.tasks import load_data


def evaluate_run(
    run_dir: str | Path,
    *,
    split: Literal["test", "validation", "mismatched"] = "test",
    branches: int | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Loss and accuracy of a finished run on a split of its data, and what else its task measures.

    Args:
        run_dir: the run.
        split: "test" or "validation"; "mismatched" is the second test split of MNLI.
        branches: use the first branches only; the list of accuracies then ends with that prefix.
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: not a finished run, a split that the data do not have, more branches than it has, or no data.
    """
    config = read_run_config(run_dir)
    model: TrunkModel = from_pretrained(run_dir)
    if branches is not None:
        model = model.truncate(branches)
    if data_dir is not None:
        config = config.replace(data_dir=data_dir)
    with join_world(device) as world:
        task = load_data(config, assets=Path(run_dir)).to(world.device)
        if split not in task.splits:
            raise ValueError(f"data {task.data.name!r} has no split {split!r}; it has {', '.join(task.splits)}")
        result = evaluate(model.to(world.device), task, split, world=world)
        outputs = task.outputs(model, split)
    return {
        "run": str(run_dir),
        "split": split,
        "branches": model.config.branches,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": result.accuracy,
        "loss": result.loss,
        **task.measures(result.loss, split),
        **result.scores,
        **outputs,
    }
