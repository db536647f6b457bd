"""Using a finished run: measuring it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from paradepth.branches import Branches, choose_executor
from paradepth.distributed import join_world, shard_branches
from paradepth.models import TrunkModel, from_pretrained
from paradepth.train.evaluate import evaluate
from paradepth.train.gates import routing_fields
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
    skip_below: float = 0.0,
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
        skip_below: of a gated model: a branch is not run for samples whose gate is below this; the result then also
            says how many branches were run, see `routing_fields`.

    Raises:
        ValueError: not a finished run, a split that the data do not have, more branches than it has, no data,
            branches that so many processes cannot share, a branch executor for a serial stack, or branches to be
            left out by a model without gates or in a way that does not go with the other options.
    """
    config = read_run_config(run_dir)
    model: TrunkModel = from_pretrained(run_dir)
    if branches is not None:
        model = model.truncate(branches)
    choose_executor(model.trunk, branch_executor)
    if skip_below:
        _leave_out(model, skip_below, branch_executor, branch_processes)
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
        routing = routing_fields(model, task, split, world=world) if skip_below else {}
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
        **routing,
    }


def _leave_out(model: TrunkModel, skip_below: float, branch_executor: str, branch_processes: int) -> None:
    if not isinstance(model.trunk, Branches):
        raise ValueError(f"skip_below is {skip_below}, and this run's model is a serial stack: it has no branches")
    if branch_executor != "loop" or branch_processes != 1:
        raise ValueError(
            f"skip_below is {skip_below}: every branch then has a batch of its own, and they are evaluated one after "
            f"another by one process; branch_executor is {branch_executor!r} and branch_processes {branch_processes}"
        )
    if model.model_type == "translator":
        raise ValueError(
            f"skip_below is {skip_below}; translations are made with keys and values of all branches remembered, and "
            "leaving some out is for models that read their input once: classifiers, taggers, masked language models"
        )
    model.trunk.skip_below = skip_below
