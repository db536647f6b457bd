"""Using a finished run: measuring it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from paradepth.branches import Branches, choose_executor
from paradepth.distributed import join_world, shard_branches
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
    branch_processes: int = 1,
    branch_executor: str = "loop",
) -> dict[str, Any]:
    """Loss and accuracy of a finished run on a split of its data, and what else its task measures.

    Under `torchrun` processes share the batches, and branches where that is asked for.

    Args:
        run_dir: the run.
        split: "test" or "validation"; "mismatched" is the second test split of MNLI.
        branches: use the first branches only; the list of accuracies then ends with that prefix.
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".
        branch_processes: processes that share the branches; the others share the batches.
        branch_executor: how branches are evaluated: "loop", "batched", "threads" or "auto".

    Raises:
        ValueError: not a finished run, a split that the data do not have, more branches than it has, no data,
            branches that so many processes cannot share, or a branch executor for a serial stack.
    """
    config = read_run_config(run_dir)
    model: TrunkModel = from_pretrained(run_dir)
    if branches is not None:
        model = model.truncate(branches)
    choose_executor(model.trunk, branch_executor)
    if data_dir is not None:
        config = config.replace(data_dir=data_dir)
    parameters = sum(p.numel() for p in model.parameters())
    with join_world(device, branch=branch_processes) as world:
        if branch_processes > 1 and not isinstance(model.trunk, Branches):
            raise ValueError(f"branch_processes is {branch_processes}, and this run's model is a serial stack")
        task = load_data(config, assets=Path(run_dir)).to(world.device)
        if split not in task.splits:
            raise ValueError(f"data {task.data.name!r} has no split {split!r}; it has {', '.join(task.splits)}")
        outputs = task.outputs(model.to(world.device), split)  # generation is serial and takes a whole model
        if isinstance(model.trunk, Branches):
            shard_branches(model.trunk, world.row)
        result = evaluate(model, task, split, world=world)
    return {
        "run": str(run_dir),
        "split": split,
        "branches": model.config.branches,
        "parameters": parameters,
        "accuracy": result.accuracy,
        "loss": result.loss,
        **task.measures(result.loss, split),
        **result.scores,
        **outputs,
    }
